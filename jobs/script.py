"""From a request and a site to one job script: checked first, then rendered from a template."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.settings.checks import NAME, SEEDS, parse_value
from jobs.site import Queue, Site

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"

# How a job, and the element of an array, calls itself. The last element of a Slurm array has the id of the whole array
# as its SLURM_JOB_ID: requeueing that would requeue all elements.
JOB_IDS = {
    "slurm": ("$SLURM_JOB_ID", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"),
    "lsf": ("$LSB_JOBID", '"$LSB_JOBID[$LSB_JOBINDEX]"'),
    "none": ("", ""),
}
# Where the experiments look for their data; both, for a script does not know which of them its experiment reads.
DATA_VARIABLES = ("AADL_DATA_DIR", "AADL_IMAGENET_DIR")


class Script(string.Template):
    """A template with fields @{name}, for the dollar belongs to the shell."""

    delimiter = "@"


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
    repeats = queue is None or not site.queues or site.queues[queue].repeats
    if request.chain > 1 and not repeats:
        raise ValueError(
            f"--chain must be 1 in queue {queue} of {site.name}, where the site allows no chains, got {request.chain}"
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


def _check_limits(site: Site, queue: Queue, name: str, nodes: int, seconds: int) -> None:
    if not queue.limits:
        return
    for limit in queue.limits:
        if nodes <= limit.nodes:
            if seconds > limit.minutes * 60:
                raise ValueError(
                    f"--time must be at most {_clock(limit.minutes * 60)} for {nodes} nodes in queue {name} of "
                    f"{site.name}, got {_clock(seconds)}"
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


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _quoted(text: object) -> str:
    return shlex.quote(str(text))


def _fields(job: Job) -> dict[str, object]:
    """What texts of a site may name in braces (FIELDS of site.py)."""
    return {
        "nodes": job.nodes,
        "ranks": job.ranks,
        "ranks_per_node": job.ranks_per_node,
        "cores_per_rank": job.cores_per_rank,
        "cores_per_node": job.ranks_per_node * job.cores_per_rank,
        "slots": job.ranks * job.cores_per_rank,
        "gpus_per_node": job.gpus_per_node,
        "minutes": job.seconds // 60,
        "name": job.name,
    }


def render(job: Job, path: Path, command: Sequence[str]) -> str:
    """The script of a job.

    Args:
        job: a checked job.
        path: where the script will be kept.
        command: the command line that asked for it.
    """
    site = job.site
    template = {"slurm": "slurm.sh", "lsf": "lsf.sh", "none": "workstation.sh"}[site.scheduler]
    index = {"slurm": "SLURM_ARRAY_TASK_ID", "lsf": "LSB_JOBINDEX - 1", "none": ""}[site.scheduler]
    seed = ""
    if job.seeds:
        seed = f"seeds=({' '.join(map(str, job.seeds))})\nseed=${{seeds[{index}]}}"
    ends = f"export AADL_END_TIME=$(($(date +%s) + {job.seconds}))" if job.seconds else ""
    text = Script((TEMPLATES / template).read_text(encoding="utf-8")).substitute(
        directives="\n".join(_directives(job)),
        title=site.title,
        command=shlex.join(command),
        script=_quoted(path) if site.submit == "file" else f"< {_quoted(path)}",
        checkout=_quoted(CHECKOUT),
        setup=_setup(job),
        seconds=job.seconds,
        deadline=ends,
        jobs=_quoted(job.jobs),
        max_restarts=job.max_restarts,
        stage=_stage(job),
        seed=seed,
        launch=_launch(job),
        job_id=JOB_IDS[site.scheduler][bool(job.seeds)],
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _directives(job: Job) -> list[str]:
    return {"slurm": _slurm_directives, "lsf": _lsf_directives, "none": lambda job: []}[job.site.scheduler](job)


def _of_site(job: Job) -> list[str]:
    """The directives that the site's file gives: account, queue, and its own."""
    site = job.site
    texts = [site.account_directive.format(account=job.account)] if job.account else []
    if job.queue is not None:
        texts += site.queues[job.queue].directives if site.queues else [site.queue_directive.format(queue=job.queue)]
    texts += site.directives
    texts += site.gpu_directives if job.gpus_per_node else ()
    return [text.format(**_fields(job)) for text in texts]


def _features(job: Job) -> list[str]:
    staged = job.site.node_local.features if job.site.node_local and (job.environment or job.data) else ()
    return [*job.site.features, *staged]


def _slurm_directives(job: Job) -> list[str]:
    site = job.site
    log = "%x-%A_%a.out" if job.seeds else "%x-%j.out"
    options = [
        f"--job-name={job.name}",
        f"--output={_quoted(job.jobs / log)}",
        "--open-mode=append",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--cpus-per-task={job.cores_per_rank}",
        f"--time={_clock(job.seconds)}",
        f"--signal=B:{site.warning.signal}@{site.warning.seconds}",
        "--requeue" if job.max_restarts else "--no-requeue",
    ]
    if _features(job):
        options.append(f"--constraint={_quoted('&'.join(_features(job)))}")
    if job.seeds:
        options.append(f"--array=0-{len(job.seeds) - 1}")
    return [f"#SBATCH {option}" for option in [*options, *_of_site(job)]]


def _lsf_directives(job: Job) -> list[str]:
    site = job.site
    hours, minutes = divmod(job.seconds // 60, 60)
    log = "%J.%I.out" if job.seeds else "%J.out"
    options = [
        f'-J "{job.name}[1-{len(job.seeds)}]"' if job.seeds else f"-J {job.name}",
        f"-o {_quoted(job.jobs / f'{job.name}-{log}')}",
        f"-W {hours}:{minutes:02}",
        f"-wt {site.warning.seconds // 60}",
        f"-wa {site.warning.signal}",
    ]
    if _features(job):
        options.append(f'-alloc_flags "{" ".join(_features(job))}"')
    return [f"#BSUB {option}" for option in [*options, *_of_site(job)]]


def _variables(job: Job) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(job.cores_per_rank), **job.site.environment}


def _setup(job: Job) -> str:
    """Shell lines that make the environment of the ranks."""
    lines = list(job.site.setup)
    if job.site.modules:
        lines.append(f"module load {' '.join(map(_quoted, job.site.modules))}")
    lines += [f'export {name}="{value}"' for name, value in _variables(job).items()]
    return "\n".join(lines)


def _stage(job: Job) -> str:
    """Shell lines that copy the environment and the data to the nodes' own disks."""
    if job.site.node_local is None or not (job.environment or job.data):
        return ""
    folder = job.site.node_local.path
    each = {
        "srun": f"srun --nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1",
        "jsrun": f"jsrun -n {job.nodes} -r 1 -a 1 -c 1",
        "mpirun": f"mpirun -np {job.nodes} --map-by ppr:1:node",
    }.get(job.site.launcher, "")
    stage = f"{each} bash jobs/templates/stage.sh".strip()
    lines = [
        "# To the disk of each node: thousands of ranks that read the same files are slow on a shared file system."
    ]
    if job.environment is not None:
        archive = _quoted(job.environment)
        if job.site.scheduler == "slurm":
            lines.append(f'{each} mkdir -p "{folder}" || exit 1')
            lines.append(f'sbcast -pf {archive} "{folder}/environment.tar.gz" || exit 1')
            archive = f'"{folder}/environment.tar.gz"'
        lines.append(f'{stage} environment {archive} "{folder}/environment" || exit 1')
    if job.data is not None:
        lines.append(f'{stage} data {_quoted(job.data)} "{folder}/data" || exit 1')
        lines += [f'export {name}="{folder}/data"' for name in DATA_VARIABLES]
    return "\n".join(lines)


def _launch(job: Job) -> str:
    """The command that starts the ranks."""
    python = _quoted(job.python)
    if job.environment is not None and job.site.node_local is not None:
        python = f'"{job.site.node_local.path}/environment/bin/python"'
    run = ["-m experiments run", _quoted(job.config), "--results", _quoted(job.results)]
    for override in job.overrides:
        run += ["--set", _quoted(override)]
    if job.seeds:
        run += ["--set", '"seeds=$seed"']
    experiment = " ".join(run)
    if job.site.gpu_order and job.gpus_per_node == job.site.node.gpus:
        python = f"env CUDA_VISIBLE_DEVICES={','.join(map(str, job.site.gpu_order))} {python}"
    if job.site.launcher == "torchrun":
        many = f"-m torch.distributed.run --standalone --nproc-per-node={job.ranks_per_node} "
        return f"{python} {many if job.ranks > 1 else ''}{experiment}"
    options = [*_launcher_options(job), *job.site.launch_options]
    options += job.site.gpu_launch_options if job.gpus_per_node else ()
    launcher = " ".join([job.site.launcher, *options]).format(**_fields(job))
    return f"{launcher} \\\n    bash jobs/templates/rank.sh {python} {experiment}"


def _launcher_options(job: Job) -> list[str]:
    """What every site needs: the shape, and an end of the job when a rank fails."""
    if job.site.launcher == "srun":
        shape = ["--nodes={nodes}", "--ntasks={ranks}", "--ntasks-per-node={ranks_per_node}"]
        return [*shape, "--cpus-per-task={cores_per_rank}", "--export=ALL", "--kill-on-bad-exit=1", "--unbuffered"]
    if job.site.launcher == "jsrun":  # one resource set a node, whose ranks see all its GPUs
        shape = ["-n {nodes}", "-r 1", "-a {ranks_per_node}", "-c {cores_per_node}", "-g {gpus_per_node}"]
        threads = f"-E OMP_NUM_THREADS={_variables(job)['OMP_NUM_THREADS']}"
        return [*shape, "-b packed:{cores_per_rank}", "-d packed", "-X 1", threads]
    names = ["AADL_END_TIME", "AADL_STOPPED_FILE", "AADL_RESTART_COUNT", *_variables(job)]
    # Other nodes get what is named here and no more, and mpirun complains of names that are not set.
    where = [f"${{{{{name}:+-x {name}}}}}" for name in DATA_VARIABLES]
    shape = ["-np {ranks}", "--map-by ppr:{ranks_per_node}:node:pe={cores_per_rank}"]
    return [*shape, *(f"-x {name}" for name in names), *where]
