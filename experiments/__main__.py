"""Command line of the suite: `python -m experiments run | reproduce | figures | summarize | doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.distributed.ranks import Ranks
    from experiments.settings.run_config import ExperimentConfig

# Every command imports what it needs: `--help` waits for neither torch nor matplotlib.

CONFIGS = Path(__file__).parent / "configs"
DOCS_FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 after a mistake of the user, or results that cannot be shown, and 1 after a failed run, each explained in
        one sentence on stderr; 75 after
        a signal or a time limit that stopped a run, which is saved: the same command goes on; 130 after Ctrl-C and 143
        after SIGTERM outside of a run.
    """
    options = _parser().parse_args(arguments)
    from experiments.distributed.departure import Interrupted
    from experiments.distributed.interruption import EXIT_RESUME

    try:
        with _sigterm_interrupts():
            code = options.command(options)
    except Interrupted as error:
        if int(os.environ.get("RANK") or 0) == 0:  # one of the ranks is enough, where they can be told apart
            print(f"{error}: the same command goes on", file=sys.stderr)
        return EXIT_RESUME
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("interrupted: finished runs are kept; the same command goes on with the others", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    return int(code or 0)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the command as Ctrl-C does."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Turns SIGTERM into an interrupt, so that the workers end too.

    Not in a thread, where Python allows no handlers. While a run is trained, it saves and stops instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _parser() -> argparse.ArgumentParser:
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="folder (results)")
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument("--only", metavar="EXPERIMENT", help="this experiment alone")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--jobs", type=int, metavar="N", help="worker processes (one a core)")
    running.add_argument("--force", action="store_true", help="make finished runs again")

    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "make the runs of one configuration that are not finished yet"
    run = commands.add_parser("run", parents=[everywhere, running], help=text, description=text)
    run.add_argument("config", metavar="CONFIG", help="a YAML file")
    text = "override a setting, repeatable; variants=NAME,NAME keeps these variants and leaves out the studies"
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    run.set_defaults(command=_run)
    text = "make all laptop configurations: runs, figures and tables; the variable ONLY stands for --only"
    reproduce = commands.add_parser("reproduce", parents=[everywhere, running, several], help=text, description=text)
    reproduce.set_defaults(command=_reproduce)
    text = "draw the figures of all results"
    figures = commands.add_parser("figures", parents=[everywhere, several], help=text, description=text)
    figures.add_argument("--docs", action="store_true", help="also copy them to docs/figures")
    figures.set_defaults(command=_figures)
    text = "print the tables of all results and write them to summary.md"
    table = commands.add_parser("summarize", parents=[everywhere, several], help=text, description=text)
    table.set_defaults(command=_summarize)
    text = "look at this machine, or at all ranks of a job: versions, devices, binding, network, folder of results"
    check = commands.add_parser("doctor", help=text, description=text)
    add_doctor_arguments(check)
    check.set_defaults(command=_doctor)
    return parser


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `doctor`."""
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="folder (results)")
    parser.add_argument(
        "--site", metavar="NAME", help="compare with jobs/sites/NAME.yaml, or a file that ends in .yaml"
    )
    text = "fail below this bandwidth of all_reduce (no limit)"
    parser.add_argument("--floor", type=float, metavar="GB/s", help=text)
    text = "until all ranks have met (60)"
    parser.add_argument("--start-seconds", type=float, default=60.0, metavar="S", help=text)


def _doctor(options: argparse.Namespace) -> int:
    from experiments.distributed.doctor import command
    from experiments.settings.yaml_file import read_yaml

    return command.main(options, read_yaml)


def _run(options: argparse.Namespace) -> None:
    from experiments.catalog import load_config
    from experiments.distributed.launch import ranks_from_environment

    config = load_config(options.config, options.set)
    _execute(Path(options.config), config, ranks_from_environment(os.environ), options)


def _execute_here(config: ExperimentConfig, ranks: Ranks, options: argparse.Namespace) -> None:
    """Makes the runs in this process and its like; a rank that fails ends the others."""
    from experiments.distributed.departure import Interrupted, end_on_failure
    from experiments.distributed.devices import with_device
    from experiments.distributed.interruption import Interruption, write_stopped_file
    from experiments.runs.execute import execute_experiment

    interrupted: Interrupted | None = None
    # From now on a signal ends in exit code 75, also while the ranks meet and the data is read.
    with end_on_failure(ranks), Interruption() as interruption:
        ranks = with_device(ranks, config.launch)
        how = {"num_jobs": _jobs(options), "force": options.force, "interruption": interruption}
        try:
            execute_experiment(config, ranks, options.results, **how)
        except Interrupted as error:
            interrupted = error
    if interrupted is not None:
        if ranks.rank == 0:
            write_stopped_file()
        raise interrupted


def _jobs(options: argparse.Namespace) -> int:
    """The number of worker processes, by default one a core."""
    if options.jobs is None:
        from data_loaders.workers import num_cores

        return num_cores()
    if options.jobs < 1:
        raise ValueError(f"--jobs must be an integer >= 1, got {options.jobs}")
    return int(options.jobs)


def _reproduce(options: argparse.Namespace) -> int:
    from experiments.catalog import experiment_of, load_config
    from experiments.distributed.launch import ranks_from_environment
    from experiments.training.progress import duration

    only = options.only or os.environ.get("ONLY") or None
    paths = sorted(CONFIGS.glob("*/laptop.yaml"))
    names = [path.parent.name for path in paths]
    if only is not None and only not in names:
        raise ValueError(f"--only must be one of {', '.join(names)}, got {only!r}")
    chosen = [(path, load_config(path)) for path in paths if only in (None, path.parent.name)]
    configs = [config for _, config in chosen]
    ranks = ranks_from_environment(os.environ)
    print("This will run:", file=sys.stderr)
    for config in configs:
        minutes = f", about {config.expected_minutes:g} minutes on two cores" if config.expected_minutes else ""
        print(
            f"  {config.experiment}: {len(config.variants)} variants, {len(config.seeds)} seeds{minutes}",
            file=sys.stderr,
        )
    start = time.perf_counter()
    for number, (path, config) in enumerate(chosen, 1):
        _execute(path, config, ranks, options)
        expected = [config.expected_minutes or 0.0 for config in configs]
        if ranks.rank == 0 and number < len(chosen):
            seconds = time.perf_counter() - start
            # The expected minutes are those of another machine, so the time until now says how fast this one is.
            made, left = sum(expected[:number]), sum(expected[number:])
            more = f", about {duration(seconds * left / made)} left" if made and all(expected) else ""
            print(f"{number} of {len(chosen)} experiments, {duration(seconds)}{more}", file=sys.stderr, flush=True)
    if ranks.rank != 0:
        return 0

    def show(folder: Path, note: Callable[[str], None]) -> None:
        for path in experiment_of(folder).draw(folder, note):
            print(path)
        print(experiment_of(folder).table(folder, note))

    folders = (options.results / config.experiment / config.scale for config in configs)
    code = _show(options.results, folders, show)
    print(f"{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    return code


def _execute(path: Path, config: ExperimentConfig, ranks: Ranks, options: argparse.Namespace) -> None:
    """Makes the runs of a configuration; one that wants several ranks is given to torchrun, unless it is by now."""
    from experiments.distributed.departure import Interrupted
    from experiments.distributed.interruption import STOPPED_FILE, Interruption

    if config.num_ranks == 1 or ranks.launcher != "single process":
        _execute_here(config, ranks, options)
        return
    arguments = ["run", str(path), "--results", str(options.results), *(["--force"] if options.force else [])]
    for text in getattr(options, "set", []):
        arguments += ["--set", text]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.num_ranks}"]
    with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
        stopped = Path(folder) / "stopped"  # torchrun itself has one exit code for everything
        environment = os.environ | {STOPPED_FILE: str(stopped)}
        with subprocess.Popen([*command, "-m", "experiments", *arguments], env=environment) as launcher:
            code, told = None, False
            while code is None:
                try:
                    code = launcher.wait(timeout=1.0)
                except subprocess.TimeoutExpired:
                    if interruption.reason and not told:
                        told = True
                        launcher.terminate()  # torchrun passes it on, and the ranks save
                except BaseException:
                    launcher.terminate()
                    launcher.wait()
                    raise
        if stopped.exists():
            raise Interrupted(f"{config.experiment} was stopped on its {config.num_ranks} ranks")
    if code != 0:
        raise RuntimeError(f"{config.experiment} failed on {config.num_ranks} ranks, see above")


def _show(results: Path, folders: Iterable[Path], show: Callable[[Path, Callable[[str], None]], None]) -> int:
    """Shows each folder of results; one that cannot be shown, or a record in it, hides no other.

    Returns:
        2 where a line on stderr says what was left out, else 0.
    """
    from experiments.records.compare import closed_folders

    left_out: list[str] = []

    def note(line: str) -> None:
        if line not in left_out:
            left_out.append(line)
            print(line, file=sys.stderr, flush=True)

    for folder in closed_folders(results):
        note(f"left out: {folder} is closed to this account")
    for folder in folders:
        try:
            show(folder, note)
        except (ValueError, OSError) as error:
            note(f"left out: {error}")
        except LookupError as error:  # records of another version
            note(f"left out: the records in {folder} have no {error}")
    return 2 if left_out else 0


def _figures(options: argparse.Namespace) -> int:
    from experiments.catalog import experiment_of
    from experiments.records.compare import find_folders

    def show(folder: Path, note: Callable[[str], None]) -> None:
        for path in experiment_of(folder).draw(folder, note):
            print(path)
            if options.docs:
                DOCS_FIGURES.mkdir(parents=True, exist_ok=True)
                copy = DOCS_FIGURES / f"{folder.parent.name}_{folder.name}_{path.name}"
                copy.write_bytes(path.read_bytes())
                print(copy)

    return _show(options.results, find_folders(options.results, options.only), show)


def _summarize(options: argparse.Namespace) -> int:
    from experiments.catalog import experiment_of
    from experiments.records.compare import find_folders

    folders = find_folders(options.results, options.only)
    return _show(options.results, folders, lambda folder, note: print(experiment_of(folder).table(folder, note)))


if __name__ == "__main__":
    code = main()
    from experiments.distributed.departure import leave

    leave(code)
