"""What a machine is and how its jobs are started: one YAML file a site, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from experiments.settings.checks import (
    BOOLEAN,
    NAME,
    OPTIONS,
    TEXT,
    Kind,
    choice,
    integer,
    optional,
    parse_value,
    read_settings,
    refuse_unknown,
    sequence,
    setting,
)
from experiments.settings.yaml_file import read_yaml

FOLDER = Path(__file__).parent / "sites"
# Launchers of each scheduler.
LAUNCHERS = {"slurm": ("srun",), "lsf": ("jsrun", "mpirun"), "none": ("torchrun",)}
# What texts of a site may name in braces.
FIELDS = (
    "nodes",
    "ranks",
    "ranks_per_node",
    "cores_per_rank",
    "cores_per_node",
    "slots",
    "gpus_per_node",
    "minutes",
    "name",
)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise ValueError
    return tuple(value)


def _directives(value: Any) -> tuple[str, ...]:
    texts = _texts(value)
    for text in texts:
        if "\n" in text or set(re.findall(r"{(\w*)}", text)) - set(FIELDS):
            raise ValueError
    return texts


def _variables(value: Any) -> dict[str, str]:
    """Values stand in double quotes in the script, so that they may name variables, and nothing else is expanded."""
    variables: dict[str, str] = {}
    for name, text in OPTIONS.parse(value).items():
        text = str(text) if isinstance(text, int) and not isinstance(text, bool) else text
        plain = isinstance(text, str) and not re.search(r'["`\\\n]|\$(?!\w|\{\w+(:-[\w./]+)?\})', text)
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not plain:
            raise ValueError
        variables[name] = text
    return variables


def _local(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(/|\$)[\w./${}:-]*", value):
        raise ValueError
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(entry) is not int or entry < 0 for entry in value):
        raise ValueError
    if len(set(value)) < len(value):
        raise ValueError
    return tuple(value)


def _date(value: Any) -> date:
    if not isinstance(value, str):
        raise ValueError
    return date.fromisoformat(value)


TEXTS = Kind("a list of texts", _texts)
DIRECTIVES = Kind("a list of lines in which braces hold one of " + ", ".join(FIELDS), _directives)
NUMBERS = Kind("a list of different integers >= 0", _numbers)
DATE = optional(Kind("a date as 2026-01-31", _date))
VARIABLES = Kind('a mapping from variables to texts without ", `, \\ and $( )', _variables)


@dataclass(frozen=True)
class Verified:
    """Where job scripts for the site ran, and when; `note` says what did, `guides` when the file was last compared with
    the guides among its sources."""

    by: str = setting(choice("real machine", "local Slurm", "fake LSF", "this machine", "never"))
    date: Any = setting(DATE, None)  # noqa: RUF009
    guides: Any = setting(DATE, None)  # noqa: RUF009
    note: str = setting(TEXT, "nothing was run")


@dataclass(frozen=True)
class Node:
    """What a job may use of one node; None where it is not known, so that nothing is refused."""

    cores: int | None = setting(optional(integer(1)), None)
    gpus: int | None = setting(optional(integer(0)), None)


@dataclass(frozen=True)
class RanksPerNode:
    """Ranks a node, the cores of each, and the GPUs of the node, unless the command line says otherwise."""

    per_node: int = setting(integer(1), 1)
    cores: int = setting(integer(1), 1)
    gpus_per_node: int = setting(integer(0), 0)


@dataclass(frozen=True)
class Limit:
    """The wall time that a job of at most so many nodes may ask for."""

    nodes: int = setting(integer(1))
    minutes: int = setting(integer(1))


def _limits(value: Any) -> tuple[Limit, ...]:
    if not isinstance(value, list):
        raise ValueError
    limits = tuple(read_settings(Limit, entry, "limit") for entry in value)
    if [limit.nodes for limit in limits] != sorted({limit.nodes for limit in limits}):
        raise ValueError
    return limits


@dataclass(frozen=True)
class Queue:
    """A queue.

    Attributes:
        directives: that name it.
        limits: by ascending number of nodes; () for no known limit.
        repeats: whether the site allows several jobs for the same work: chains, arrays, studies and requeued jobs.
    """

    directives: tuple[str, ...] = setting(DIRECTIVES)
    limits: tuple[Limit, ...] = setting(Kind("a list of {nodes, minutes} with ascending nodes", _limits), ())
    repeats: bool = setting(BOOLEAN, True)


@dataclass(frozen=True)
class WarningSignal:
    """The signal that announces the time limit, and how long before."""

    signal: str = setting(choice("USR1", "USR2", "TERM"), "USR2")
    seconds: int = setting(integer(1), 300)


@dataclass(frozen=True)
class NodeLocal:
    """A disk of the node's own: its path there, and the features or flags a job must ask for to have it."""

    path: str = setting(Kind("an absolute path, in which $USER and the like may stand", _local))
    features: tuple[str, ...] = setting(TEXTS, ())


@dataclass(frozen=True)
class Site:
    """A machine, after its file in `sites/`; sections are described at their own classes.

    Attributes:
        title: for people.
        status: what a user must know first, None for nothing.
        scheduler, launcher: who gives the nodes and who starts the ranks.
        sources: where the facts come from.
        submit: whether the scheduler takes the script as a file or on stdin.
        account: whether a job must, may or cannot name an account.
        queues: by name, the default first; where there are none, any name goes into `queue_directive`.
        directives: of every job; `gpu_directives` are for jobs with GPUs.
        features: Slurm constraints, or the flags of LSF's -alloc_flags.
        gpu_order: numbers of the GPUs of a node, that of its first rank first; () for 0, 1, 2 and so on. It holds for
            jobs with all GPUs of a node, and is set after the launcher, which numbers them in its own way.
        launch_options: of every launch; `gpu_launch_options` for jobs with GPUs.
        python: the interpreter on the nodes, None for the one that submits.
        modules: loaded in the script; `setup` are lines of shell before that.
        environment: variables of the job.
        refused_variables: variables that must not be set when a job is submitted.
        max_restarts: how often a job may be started again.
    """

    title: str = setting(TEXT)
    scheduler: str = setting(choice(*LAUNCHERS))
    launcher: str = setting(choice(*(name for names in LAUNCHERS.values() for name in names)))
    sources: tuple[str, ...] = setting(sequence(TEXT))
    status: str | None = setting(optional(TEXT), None)
    submit: str = setting(choice("file", "stdin"), "file")
    account: str = setting(choice("required", "optional", "none"), "optional")
    account_directive: str = setting(TEXT, "--account={account}")
    queue_directive: str = setting(TEXT, "--partition={queue}")
    directives: tuple[str, ...] = setting(DIRECTIVES, ())
    gpu_directives: tuple[str, ...] = setting(DIRECTIVES, ())
    features: tuple[str, ...] = setting(TEXTS, ())
    launch_options: tuple[str, ...] = setting(DIRECTIVES, ())
    gpu_launch_options: tuple[str, ...] = setting(DIRECTIVES, ())
    gpu_order: tuple[int, ...] = setting(NUMBERS, ())
    python: str | None = setting(optional(TEXT), None)
    modules: tuple[str, ...] = setting(TEXTS, ())
    setup: tuple[str, ...] = setting(TEXTS, ())
    environment: dict[str, str] = setting(VARIABLES, {})  # noqa: RUF009
    refused_variables: tuple[str, ...] = setting(TEXTS, ())
    max_restarts: int = setting(integer(0), 20)
    # sections, read apart
    name: str = ""
    verified: Verified | None = None
    node: Node = Node()
    ranks: RanksPerNode = RanksPerNode()
    warning: WarningSignal = WarningSignal()
    node_local: NodeLocal | None = None
    queues: dict[str, Queue] | None = None


SECTIONS = {
    "verified": Verified,
    "node": Node,
    "ranks": RanksPerNode,
    "warning": WarningSignal,
    "node_local": NodeLocal,
}


def site_names() -> list[str]:
    """Names of the sites that come with the suite."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_site(name: str) -> Site:
    """Reads a site by its name, or from a file that ends in .yaml.

    Raises:
        ValueError: no such site, unknown or missing key, or a value that is not allowed.
        OSError: the file cannot be read.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if path.parent == FOLDER and not path.is_file():
        raise ValueError(f"--site must be one of {', '.join(site_names())}, or a file that ends in .yaml, got {name!r}")
    raw = read_yaml(path)
    try:
        return _site(raw, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _site(raw: Mapping[str, Any], name: str) -> Site:
    refuse_unknown(raw, {entry.name: MISSING for entry in fields(Site) if entry.name != "name"}, "")
    parts: dict[str, Any] = {key: read_settings(cls, raw[key], key) for key, cls in SECTIONS.items() if raw.get(key)}
    if "verified" not in parts:
        raise ValueError("verified is missing; it must say by what job scripts were run: {by: never} or more")
    queues = {
        parse_value(key, NAME, "queues"): read_settings(Queue, value, f"queues.{key}")
        for key, value in parse_value(raw.get("queues") or {}, OPTIONS, "queues").items()
    }
    settings = {key: value for key, value in raw.items() if key not in (*SECTIONS, "queues")}
    base = read_settings(Site, settings, "site")
    site = Site(**{**vars(base), **parts, "name": parse_value(name, NAME, "name"), "queues": queues})
    _check(site)
    return site


def _check(site: Site) -> None:
    """Settings that contradict each other.

    Raises:
        ValueError: they do.
    """
    if site.launcher not in LAUNCHERS[site.scheduler]:
        raise ValueError(
            f"launcher must be one of {', '.join(LAUNCHERS[site.scheduler])} for scheduler {site.scheduler}, "
            f"got {site.launcher!r}"
        )
    assert site.verified is not None
    if (site.verified.by == "never") != (site.verified.date is None):
        raise ValueError("verified.date must be given, unless verified.by is never")
    if site.scheduler == "lsf" and site.warning.seconds % 60:
        raise ValueError(f"warning.seconds must be whole minutes for LSF, got {site.warning.seconds}")
    if any("alloc_flags" in text for text in site.directives):
        raise ValueError("directives must not hold -alloc_flags, of which LSF honors one line: use features")
    node, ranks = site.node, site.ranks
    if site.gpu_order and sorted(site.gpu_order) != list(range(node.gpus or 0)):
        raise ValueError(f"gpu_order must name each of the {node.gpus} GPUs of a node, got {list(site.gpu_order)}")
    if node.cores is not None and ranks.per_node * ranks.cores > node.cores:
        raise ValueError(f"ranks must fit the node of {node.cores} cores, got {ranks.per_node} ranks of {ranks.cores}")
    if node.gpus is not None and ranks.gpus_per_node > node.gpus:
        raise ValueError(f"ranks.gpus_per_node must be at most the {node.gpus} of the node, got {ranks.gpus_per_node}")
