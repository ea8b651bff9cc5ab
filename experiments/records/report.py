"""One self-contained HTML page of results: it names no other file and needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.distributed.rendezvous import spans
from experiments.records.intervals import LEVEL, as_text, intervals_of, short_name, tables_of
from experiments.records.reading import Run
from experiments.settings.yaml_file import to_yaml

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid #ccc; padding-top: 1.5rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
pre { font-size: .8rem; overflow-x: auto; background: #f6f6f6; padding: 1rem; }
summary { cursor: pointer; font-weight: 600; } .caution { color: #a00000; font-weight: 600; }
"""


def html_page(sections: Iterable[str], made: str) -> str:
    """The page of `section_of` each folder of results; `made` says when and by which code."""
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>Results</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Results</h1>\n"
        f"<p>{escape(made)}</p>\n{body}\n</body>\n</html>\n"
    )


def section_of(folder: Path, runs: Sequence[Run], figures: Iterable[Path], table: str) -> str:
    """The figures, tables, configuration and origin of the runs in one folder `results/<experiment>/<scale>`.

    Args:
        folder: of the results.
        runs: its finished runs, at least one.
        figures: PNG files, which the page embeds.
        table: the text of the experiment's own table.
    """
    surrogate = any("surrogate" in run.attributes["data_source"] for run in runs)
    parts = [f"<h2>{escape(folder.parent.name)}, {escape(folder.name)}</h2>"]
    if surrogate:
        parts.append('<p class="caution">Surrogate data: random numbers with the statistics of the real file.</p>')
    parts += [_figure(path) for path in figures]
    parts += ["<h3>Table</h3>", f"<pre>{escape(table)}</pre>", *_intervals(runs)]
    parts += ["<h3>Configuration</h3>", *_configuration(runs), "<h3>Origin</h3>", _origin(runs)]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.stem.replace("_", " "))
    return f'<figure><img src="data:image/png;base64,{data}" alt="{name}"><figcaption>{name}</figcaption></figure>'


def _intervals(runs: Sequence[Run]) -> list[str]:
    [(metrics, rows)] = tables_of(intervals_of(runs), as_text).values()
    return [
        "<h3>Intervals</h3>",
        f"<p>Medians at the end of the runs [bootstrap interval of the median at the level {LEVEL:g}].</p>",
        _table(["variant", *map(short_name, metrics)], rows),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _configuration(runs: Sequence[Run]) -> list[str]:
    """The settings of each variant, one seed for all, folded."""
    shown: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key != "seed"}
        shown.setdefault(run.attributes["variant"], settings)
    return [
        f"<details><summary>{escape(name)}</summary><pre>{escape(to_yaml(settings))}</pre></details>"
        for name, settings in shown.items()
    ]


def _origin(runs: Sequence[Run]) -> str:
    """Where the records come from; several values stand beside each other."""

    def values(name: str) -> str:
        return ", ".join(sorted({str(run.attributes.get(name, "")) for run in runs} - {""}))

    commits = {f"{run.attributes['git_commit']}{' with changes' * bool(run.attributes['git_dirty'])}" for run in runs}
    variables = {pair for run in runs for pair in json.loads(run.attributes.get("environment", "{}")).items()}
    start, end = (sorted(str(run.attributes.get(name, "")) for run in runs) for name in ("start_utc", "end_utc"))
    rows = {
        "runs": f"{len(runs)} of {len({run.attributes['variant'] for run in runs})} variants",
        "seeds": spans(sorted({int(run.attributes["seed"]) for run in runs})),
        "data": values("data_source"),
        "code": ", ".join(sorted(commits)),
        **{name.removesuffix("_version").replace("_", " "): values(name) for name in _OF_MACHINE},
        "environment": ", ".join(f"{name}={value}" for name, value in sorted(variables)),
        "made": f"{start[0]} to {end[-1]}",
    }
    return _table(("what", "value"), [row for row in rows.items() if row[1]])


_OF_MACHINE = (
    "aadl_version", "python_version", "torch_version", "numpy_version", "h5py_version",
    "hosts", "devices", "world_size", "launcher", "num_threads", "scheduler", "job_id",
)  # fmt: skip
