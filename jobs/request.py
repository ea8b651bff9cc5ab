"""What a user asks for, checked against a site: from a request to a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, NonNegativeInt, PlainValidator, PositiveInt

from experiments.settings.kinds import Items, Name, Seeds, must
from experiments.settings.schema import Settings, read_settings
from jobs.site import Site


def _array(text: str | None) -> tuple[int, ...]:
    """The seeds of `seeds=0-9`, () for None."""
    if text is None:
        return ()
    key, _, value = text.partition("=")
    if key != "seeds":
        raise ValueError("must be seeds=... as seeds=0-9")
    seeds: tuple[int, ...] = read_settings(Seeds, value, "seeds")
    return seeds


def _path(path: Path) -> Path:
    if re.search(r"[%\n]", str(path)):
        raise ValueError(f"must hold neither % nor a new line, got {str(path)!r}")
    return path.resolve()


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path.resolve()


Word = Annotated[
    str,
    AfterValidator(
        must("be a word of letters, digits, '_', '.' and '-'", re.compile(r"[\w.-]+", re.ASCII).fullmatch),
    ),
]


class Request(Settings):
    """What the user asks for; None stands for what the site says. Names are those of the command line."""

    config: Annotated[Path, AfterValidator(_path)]
    results: Annotated[Path, AfterValidator(_path)]
    nodes: PositiveInt = 1
    time: str | None = None
    account: Word | None = None
    queue: Word | None = None
    ranks_per_node: PositiveInt | None = None
    cores_per_rank: PositiveInt | None = None
    gpus_per_node: NonNegativeInt | None = None
    name: Name | None = None
    python: str | None = None
    set: Items[str] = ()
    array: Annotated[tuple[int, ...], PlainValidator(_array)] = ()
    chain: PositiveInt = 1
    stage_environment: Annotated[Path, AfterValidator(_existing)] | None = None
    stage_data: Annotated[Path, AfterValidator(_existing)] | None = None


@dataclass(frozen=True)
class Job:
    """A checked job: everything a script needs. Counts are integers >= 1, but for `gpus_per_node` and `seconds`."""

    site: Site
    request: Request
    name: str
    python: str
    ranks_per_node: int
    cores_per_rank: int
    gpus_per_node: int
    seconds: int
    queue: str | None
    max_restarts: int

    @property
    def ranks(self) -> int:
        return self.request.nodes * self.ranks_per_node

    @property
    def folder(self) -> Path:
        """Where its script and its logs are kept."""
        return self.request.results / "jobs"


def read_request(options: Mapping[str, Any]) -> Request:
    """Checks what needs no site; ValueError names the option whose value is not allowed."""
    try:
        request: Request = read_settings(Request, {key: options[key] for key in Request.model_fields if key in options})
    except ValueError as error:
        key, _, message = str(error).partition(" ")
        raise ValueError(f"--{key.replace('_', '-')} {message}") from None
    return request


def make_job(site: Site, request: Request, experiment: str, python: str) -> Job:
    """Checks a request against a site.

    Args:
        site: the machine.
        request: what is asked for.
        experiment: name of the job where the request has none.
        python: interpreter where neither the request nor the site names one.

    Raises:
        ValueError: the site cannot run the job; the message names the option, its value and what is allowed.
    """
    seconds = _wall_seconds(site, request.time)
    ranks_per_node, cores, gpus = _shape(site, request)
    queue = _queue_name(site, request.queue)
    if site.scheduler == "none":
        _refuse_batch_options(site, request)
    if request.account is not None and site.account == "none":
        raise ValueError(f"--account must be left out for {site.name}, which has none, got {request.account!r}")
    if request.account is None and site.account == "required":
        raise ValueError(f"--account is missing: {site.name} runs no job without one")
    if (request.stage_environment or request.stage_data) and site.node_local is None:
        raise ValueError(f"--stage-environment and --stage-data need a disk on each node, and {site.name} names none")
    if request.chain > 1 and request.array:
        raise ValueError("--chain and --array exclude each other: the elements of an array are requeued one by one")
    repeats = allows_repeats(site, queue)
    for option, count in (("--chain", request.chain), ("--array", len(request.array))):
        if count > 1 and not repeats:
            raise ValueError(
                f"{option} must ask for one job in queue {queue} of {site.name}, which takes no series, got {count}"
            )
    if queue is not None:
        _check_limits(site, queue, request.nodes, seconds)
    return Job(
        site=site,
        request=request,
        name=request.name or read_settings(Name, experiment, "--name"),
        python=request.python or site.python or python,
        ranks_per_node=ranks_per_node,
        cores_per_rank=cores,
        gpus_per_node=gpus,
        seconds=seconds,
        queue=queue,
        max_restarts=site.max_restarts if request.chain == 1 and repeats else 0,
    )


def _refuse_batch_options(site: Site, request: Request) -> None:
    if request.nodes != 1:
        raise ValueError(f"--nodes must be 1 on {site.name}, which has no batch system, got {request.nodes}")
    if request.array or request.chain > 1:
        raise ValueError(f"--array and --chain need a batch system, and {site.name} has none")
    if request.queue is not None:
        raise ValueError(f"--queue must be left out for {site.name}, which has none, got {request.queue!r}")


def _wall_seconds(site: Site, text: str | None) -> int:
    """The wall time; 0 for none, which only a site without a scheduler takes."""
    if text is None:
        if site.scheduler == "none":
            return 0
        raise ValueError("--time is missing; it must be a wall time as 2:00:00 (hours, minutes, seconds)")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if match is None:
        raise ValueError(
            "--time must be hours, minutes and seconds as 2:00:00, or with days as 1-00:00:00, because 2:00 means two "
            f"minutes to Slurm and two hours to LSF, got {text!r}"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if site.scheduler == "lsf" and seconds:
        raise ValueError(f"--time must be whole minutes, because LSF knows no seconds, got {text!r}")
    if total <= site.warning.seconds:
        raise ValueError(
            f"--time must be longer than the {site.warning.seconds} seconds that {site.name} leaves for the last "
            f"checkpoint, got {text!r}"
        )
    return total


def _shape(site: Site, request: Request) -> tuple[int, int, int]:
    """Ranks a node, cores a rank, GPUs a node."""
    ranks = request.ranks_per_node or site.ranks.per_node
    gpus = site.ranks.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    if site.node.gpus is not None and gpus > site.node.gpus:
        raise ValueError(f"--gpus-per-node must be at most {site.node.gpus} on {site.name}, got {gpus}")
    if 0 < gpus < ranks:
        raise ValueError(f"--ranks-per-node must be at most the {gpus} GPUs of a node, one for each rank, got {ranks}")
    cores = request.cores_per_rank or site.ranks.cores
    if site.node.cores is None:
        return ranks, cores, gpus
    if ranks > site.node.cores:
        raise ValueError(f"--ranks-per-node must be at most the {site.node.cores} cores of a node, got {ranks}")
    if request.cores_per_rank is None:  # more ranks than usual get fewer cores each
        cores = min(cores, site.node.cores // ranks)
    if ranks * cores > site.node.cores:
        raise ValueError(
            f"--cores-per-rank must be at most {site.node.cores // ranks}: {ranks} ranks share the {site.node.cores} "
            f"cores of a node, got {cores}"
        )
    return ranks, cores, gpus


def _queue_name(site: Site, wanted: str | None) -> str | None:
    if not site.queues:
        return wanted
    if wanted is not None and wanted not in site.queues:
        raise ValueError(f"--queue must be one of {', '.join(site.queues)} on {site.name}, got {wanted!r}")
    return wanted or next(iter(site.queues))


def allows_repeats(site: Site, queue: str | None) -> bool:
    """Whether a queue (None: the only one) takes more than one job for the same work."""
    return queue not in site.queues or site.queues[queue].repeats


def _check_limits(site: Site, queue: str, nodes: int, seconds: int) -> None:
    limits = site.queues[queue].limits if queue in site.queues else ()
    limit = next((limit for limit in limits if nodes <= limit.nodes), None)
    if limits and limit is None:
        raise ValueError(f"--nodes must be at most {limits[-1].nodes} in queue {queue} of {site.name}, got {nodes}")
    if limit is not None and seconds > limit.minutes * 60:
        raise ValueError(
            f"--time must be at most {clock(limit.minutes * 60)} for {nodes} nodes in queue {queue} of {site.name}, "
            f"got {clock(seconds)}"
        )


def clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
