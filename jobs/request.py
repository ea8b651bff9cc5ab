"""What a user asks for, checked against a site: from a request to a job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from experiments.settings.checks import NAME, SEEDS, parse_value
from jobs.site import Queue, Site


@dataclass(frozen=True)
class Request:
    """What the user asks for; None stands for what the site says."""

    config: Path
    results: Path
    nodes: int = 1
    time: str | None = None
    account: str | None = None
    queue: str | None = None
    ranks_per_node: int | None = None
    cores_per_rank: int | None = None
    gpus_per_node: int | None = None
    name: str | None = None
    python: str | None = None
    overrides: tuple[str, ...] = ()
    array: str | None = None
    chain: int = 1
    environment: Path | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Job:
    """A checked job: everything a script needs. Counts are integers >= 1, but for `gpus_per_node` and `seconds`."""

    site: Site
    config: Path
    results: Path
    name: str
    python: str
    nodes: int
    ranks_per_node: int
    cores_per_rank: int
    gpus_per_node: int
    seconds: int
    account: str | None
    queue: str | None
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    max_restarts: int
    environment: Path | None
    data: Path | None

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def jobs(self) -> Path:
        """Where its script and its logs are kept."""
        return self.results / "jobs"


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
    _check_nodes(site, request.nodes)
    queue = _queue_name(site, request.queue)
    if queue is not None and site.queues:
        _check_limits(site, site.queues[queue], queue, request.nodes, seconds)
    repeats = allows_repeats(site, queue)
    for option, count in (("--chain", request.chain), ("--array", len(array_seeds(request.array)))):
        if count > 1 and not repeats:
            raise ValueError(
                f"{option} must ask for one job in queue {queue} of {site.name}, which takes no series, got {count}"
            )
    if request.account is not None and site.account == "none":
        raise ValueError(f"--account must be left out for {site.name}, which has none, got {request.account!r}")
    if request.account is None and site.account == "required":
        raise ValueError(f"--account is missing: {site.name} runs no job without one")
    if (request.environment or request.data) and site.node_local is None:
        raise ValueError(f"--stage-environment and --stage-data need a disk on each node, and {site.name} names none")
    if site.scheduler == "none" and (request.array is not None or request.chain > 1):
        raise ValueError(f"--array and --chain need a batch system, and {site.name} has none")
    if request.chain < 1:
        raise ValueError(f"--chain must be an integer >= 1, got {request.chain}")
    if request.chain > 1 and request.array is not None:
        raise ValueError("--chain and --array exclude each other: the elements of an array are requeued one by one")
    for path in (request.results, request.config):
        if re.search(r"[%\n]", str(path)):
            raise ValueError(f"a path of a job must hold neither % nor a new line, got {str(path)!r}")
    return Job(
        site=site,
        config=request.config.resolve(),
        results=request.results.resolve(),
        name=parse_value(request.name or experiment, NAME, "--name"),
        python=request.python or site.python or python,
        nodes=request.nodes,
        ranks_per_node=ranks_per_node,
        cores_per_rank=cores,
        gpus_per_node=gpus,
        seconds=seconds,
        account=_word(request.account, "--account"),
        queue=queue,
        overrides=request.overrides,
        seeds=array_seeds(request.array),
        max_restarts=site.max_restarts if request.chain == 1 and repeats else 0,
        environment=request.environment.resolve() if request.environment else None,
        data=request.data.resolve() if request.data else None,
    )


def _word(value: str | None, option: str) -> str | None:
    if value is not None and not re.fullmatch(r"[\w.-]+", value, re.ASCII):
        raise ValueError(f"{option} must be a word of letters, digits, '_', '.' and '-', got {value!r}")
    return value


def _wall_seconds(site: Site, text: str | None) -> int:
    """The wall time; 0 for none, which only a site without a scheduler takes."""
    if text is None:
        if site.scheduler == "none":
            return 0
        raise ValueError("--time is missing; it must be a wall time as 2:00:00 (hours, minutes, seconds)")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if match is None:
        raise ValueError(
            "--time must be hours, minutes and seconds as 2:00:00, or with days as 1-00:00:00, for 2:00 means two "
            f"minutes to Slurm and two hours to LSF, got {text!r}"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if site.scheduler == "lsf" and seconds:
        raise ValueError(f"--time must be whole minutes, for LSF knows no seconds, got {text!r}")
    if total <= site.warning.seconds:
        raise ValueError(
            f"--time must be longer than the {site.warning.seconds} seconds that {site.name} leaves for the last "
            f"checkpoint, got {text!r}"
        )
    return total


def _shape(site: Site, request: Request) -> tuple[int, int, int]:
    """Ranks a node, cores a rank, GPUs a node."""
    for option, value in (
        ("--nodes", request.nodes),
        ("--ranks-per-node", request.ranks_per_node),
        ("--cores-per-rank", request.cores_per_rank),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be an integer >= 1, got {value}")
    ranks = request.ranks_per_node or site.ranks.per_node
    gpus = site.ranks.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    if gpus < 0 or (site.node.gpus is not None and gpus > site.node.gpus):
        raise ValueError(f"--gpus-per-node must be an integer in [0, {site.node.gpus}] on {site.name}, got {gpus}")
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


def _check_nodes(site: Site, nodes: int) -> None:
    if site.scheduler == "none" and nodes != 1:
        raise ValueError(f"--nodes must be 1 on {site.name}, which has no batch system, got {nodes}")


def _queue_name(site: Site, wanted: str | None) -> str | None:
    if not site.queues:
        if wanted is not None and site.scheduler == "none":
            raise ValueError(f"--queue must be left out for {site.name}, which has none, got {wanted!r}")
        return _word(wanted, "--queue")
    if wanted is None:
        return next(iter(site.queues))
    if wanted not in site.queues:
        raise ValueError(f"--queue must be one of {', '.join(site.queues)} on {site.name}, got {wanted!r}")
    return wanted


def allows_repeats(site: Site, queue: str | None) -> bool:
    """Whether a queue (None: the only one) takes more than one job for the same work."""
    return queue is None or not site.queues or site.queues[queue].repeats


def _check_limits(site: Site, queue: Queue, name: str, nodes: int, seconds: int) -> None:
    if not queue.limits:
        return
    for limit in queue.limits:
        if nodes <= limit.nodes:
            if seconds > limit.minutes * 60:
                raise ValueError(
                    f"--time must be at most {clock(limit.minutes * 60)} for {nodes} nodes in queue {name} of "
                    f"{site.name}, got {clock(seconds)}"
                )
            return
    raise ValueError(f"--nodes must be at most {queue.limits[-1].nodes} in queue {name} of {site.name}, got {nodes}")


def array_seeds(array: str | None) -> tuple[int, ...]:
    """The seeds of `seeds=0-9`, () without an array.

    Raises:
        ValueError: another key, or no seeds.
    """
    if array is None:
        return ()
    key, _, value = array.partition("=")
    if key != "seeds":
        raise ValueError(f"--array must be seeds=... as seeds=0-9, got {array!r}")
    seeds: tuple[int, ...] = parse_value(value, SEEDS, "--array seeds")
    return seeds


def clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
