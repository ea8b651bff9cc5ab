"""The configurations that the suite comes with, by name. It imports no torch."""

from __future__ import annotations

from pathlib import Path

from experiments.settings.suggestion import did_you_mean

CONFIGS = Path(__file__).parents[1] / "configs"
LAPTOP = "laptop"
"""The configuration for which the name of an experiment stands."""


def config_files() -> dict[str, Path]:
    """The files by name, as "burgers_2d/paper"."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(CONFIGS.glob("*/*.yaml"))}


def find_config(name: str) -> Path:
    """The file of a configuration as "burgers_2d/paper", of an experiment (its laptop one), or the path itself.

    ValueError where no configuration has this name, FileNotFoundError where there is no such file.
    """
    path, files = Path(name), config_files()
    if path.exists() and not path.is_dir():
        return path
    if path.suffix in (".yaml", ".yml"):
        beside = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        raise FileNotFoundError(f"{path} does not exist{did_you_mean(path, beside)}")
    experiments = sorted({file.parent.name for file in files.values()})
    experiment, _, scale = name.partition("/")
    if experiment not in experiments:
        raise ValueError(
            f"CONFIG must be a YAML file, a configuration as {next(iter(files), 'NAME/laptop')}, or one of "
            f"{', '.join(experiments)}, got {name!r}{did_you_mean(experiment, experiments)}"
        )
    scales = [file.stem for file in files.values() if file.parent.name == experiment]
    if (scale or LAPTOP) not in scales:
        raise ValueError(
            f"{experiment} has the configurations {', '.join(scales)}, got {scale or LAPTOP!r}"
            f"{did_you_mean(scale, scales)}"
        )
    return files[f"{experiment}/{scale or LAPTOP}"]
