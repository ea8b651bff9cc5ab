"""What a machine is and how its jobs are started: one YAML file a site, checked."""

from __future__ import annotations

import re
import string
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveInt, model_validator

from experiments.settings.kinds import Items, Name, Text, must
from experiments.settings.schema import Settings, read_settings
from experiments.settings.yaml_file import read_yaml

FOLDER = Path(__file__).parent / "sites"
LAUNCHERS = {"slurm": ("srun",), "lsf": ("jsrun", "mpirun"), "none": ("torchrun",)}
"""Launchers of each scheduler."""
FIELDS = ("nodes", "ranks", "ranks_per_node", "cores_per_rank", "cores_per_node", "slots", "gpus_per_node", "minutes",
          "name")  # fmt: skip
"""What texts of a site may name in braces."""


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _naming(*fields: str) -> AfterValidator:
    """A line in whose braces nothing but names of these fields stands."""

    def names_known_fields(text: str) -> bool:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError:  # a single brace
            return False
        named = {f"{name}{conversion or ''}{form}" for _, name, form, conversion in parts if name is not None}
        return "\n" not in text and named <= set(fields)

    return AfterValidator(must(f"be a line in which braces hold one of {', '.join(fields)}", names_known_fields))


def _is_plain(text: str) -> bool:
    """Values stand in double quotes in the script, so that they may name variables; nothing else is expanded."""
    return not re.search(r'["`\\\n]|\$(?!\w|\{\w+(:-[\w./]+)?\})', text)


Day = Annotated[str, AfterValidator(must("be a date as 2026-01-31", _is_date))]
Line = Annotated[Text, _naming(*FIELDS)]
Variable = Annotated[str, AfterValidator(must("be a name of a variable", re.compile(r"[A-Za-z_]\w*").fullmatch))]
Value = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    AfterValidator(must('be a text without ", `, \\ and $( )', _is_plain)),
]
LocalPath = Annotated[
    str,
    AfterValidator(
        must("be an absolute path, in which $USER and the like may stand", re.compile(r"(/|\$)[\w./${}:-]*").fullmatch)
    ),
]


class Verified(Settings):
    """Where job scripts for the site ran, and on which day; `date` is None where none did.

    `guides` is the day on which the file was last compared with the guides among its sources.
    """

    by: Literal["real machine", "local Slurm", "fake LSF", "this machine", "never"]
    date: Day | None = None
    guides: Day | None = None
    note: Text = "nothing was run"


class Node(Settings):
    """What a job may use of one node; None where it is not known, so that nothing is refused."""

    cores: PositiveInt | None = None
    gpus: NonNegativeInt | None = None


class RanksPerNode(Settings):
    """Ranks a node, the cores of each, and the GPUs of the node, unless the command line says otherwise."""

    per_node: PositiveInt = 1
    cores: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0


class Limit(Settings):
    """The wall time that a job of at most so many nodes may ask for."""

    nodes: PositiveInt
    minutes: PositiveInt


def _ascends(limits: tuple[Limit, ...]) -> bool:
    return [limit.nodes for limit in limits] == sorted({limit.nodes for limit in limits})


class Queue(Settings):
    """A queue, with the directives that name it, and its limits by ascending number of nodes; () for no known limit.

    It `repeats` where the site allows several jobs for the same work: chains, arrays, studies and requeued jobs.
    """

    directives: Items[Line]
    limits: Annotated[Items[Limit], AfterValidator(must("be a list with ascending nodes", _ascends))] = ()
    repeats: bool = True


class WarningSignal(Settings):
    """The signal that announces the time limit, and how long before."""

    signal: Literal["USR1", "USR2", "TERM"] = "USR2"
    seconds: PositiveInt = 300


class NodeLocal(Settings):
    """A disk of the node's own: its path there, and the features or flags a job must ask for to have it."""

    path: LocalPath
    features: Items[Text] = ()


class Site(Settings):
    """A machine, after its file in `sites/`; sections are described at their own classes.

    Attributes:
        name: that of its file, unless the file says otherwise.
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
        launch_options: of the launcher, besides those that every site needs (see script.py).
        python: interpreter on the nodes, None for the one that submits.
        setup: shell lines before everything else; `modules` are loaded after them.
        environment: variables, whose values may name others.
        refused_variables: of the submitting shell, with which jobs fail.
        max_restarts: how often a job that stopped early is started again.
    """

    name: Name
    title: Text
    status: Text | None = None
    verified: Verified
    sources: Annotated[Items[Text], AfterValidator(must("name at least one source", len))]
    scheduler: Literal["slurm", "lsf", "none"]
    launcher: Text
    submit: Literal["file", "stdin"] = "file"
    account: Literal["required", "optional", "none"] = "optional"
    account_directive: Annotated[Text, _naming("account", *FIELDS)] = "--account={account}"
    queue_directive: Annotated[Text, _naming("queue", *FIELDS)] = "--partition={queue}"
    queues: dict[Name, Queue] = {}  # noqa: RUF012
    node: Node = Node()
    ranks: RanksPerNode = RanksPerNode()
    directives: Items[Line] = ()
    gpu_directives: Items[Line] = ()
    features: Items[Text] = ()
    launch_options: Items[Line] = ()
    gpu_launch_options: Items[Line] = ()
    gpu_order: Items[NonNegativeInt] = ()
    node_local: NodeLocal | None = None
    python: Text | None = None
    modules: Items[Text] = ()
    setup: Items[Text] = ()
    environment: dict[Variable, Value] = {}  # noqa: RUF012
    refused_variables: Items[Variable] = ()
    max_restarts: NonNegativeInt = 20
    warning: WarningSignal = WarningSignal()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Site:
        node, ranks = self.node, self.ranks
        launchers = LAUNCHERS[self.scheduler]
        if self.launcher not in launchers:
            raise ValueError(
                f"launcher must be one of {', '.join(launchers)} for scheduler {self.scheduler}, got {self.launcher!r}"
            )
        if (self.verified.by == "never") != (self.verified.date is None):
            raise ValueError("verified.date must be given, unless verified.by is never")
        if self.scheduler == "lsf" and self.warning.seconds % 60:
            raise ValueError(f"warning.seconds must be whole minutes for LSF, got {self.warning.seconds}")
        if any("alloc_flags" in text for text in self.directives):
            raise ValueError("directives must not hold -alloc_flags, of which LSF honors one line: use features")
        if self.gpu_order and sorted(self.gpu_order) != list(range(node.gpus or 0)):
            raise ValueError(f"gpu_order must name each of the {node.gpus} GPUs of a node, got {list(self.gpu_order)}")
        if node.cores is not None and ranks.per_node * ranks.cores > node.cores:
            raise ValueError(
                f"ranks must fit the node of {node.cores} cores, got {ranks.per_node} ranks of {ranks.cores}"
            )
        if node.gpus is not None and ranks.gpus_per_node > node.gpus:
            raise ValueError(
                f"ranks.gpus_per_node must be at most the {node.gpus} of the node, got {ranks.gpus_per_node}"
            )
        return self


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
    raw: dict[str, Any] = {"name": path.stem, **read_yaml(path)}
    try:
        site: Site = read_settings(Site, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return site
