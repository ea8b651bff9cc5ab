"""From a checked job to its script, by a template."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Sequence
from pathlib import Path

from jobs.request import Job, clock

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"

# How a job, and the element of an array, calls itself. The last element of a Slurm array has the id of the whole array
# as its SLURM_JOB_ID: requeueing that would requeue all elements.
JOB_IDS = {
    "slurm": ("$SLURM_JOB_ID", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"),
    "lsf": ("$LSB_JOBID", '"$LSB_JOBID[$LSB_JOBINDEX]"'),
    "none": ("", ""),
}
# Where the experiments look for their data: both, because a script does not know which of them its experiment reads.
DATA_VARIABLES = ("AADL_DATA_DIR", "AADL_IMAGENET_DIR")


class Script(string.Template):
    """A template with fields @{name}, because the dollar belongs to the shell."""

    delimiter = "@"


def _quoted(text: object) -> str:
    return shlex.quote(str(text))


def _fields(job: Job) -> dict[str, object]:
    """What texts of a site may name in braces (FIELDS of site.py)."""
    return {
        "nodes": job.request.nodes,
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
    """The script of a job, which will be kept at `path`; `command` is the command line that asked for it."""
    site = job.site
    template = {"slurm": "slurm.sh", "lsf": "lsf.sh", "none": "workstation.sh"}[site.scheduler]
    index = {"slurm": "SLURM_ARRAY_TASK_ID", "lsf": "LSB_JOBINDEX - 1", "none": ""}[site.scheduler]
    seed = ""
    if job.request.array:
        seed = f"seeds=({' '.join(map(str, job.request.array))})\nseed=${{seeds[{index}]}}"
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
        jobs=_quoted(job.folder),
        max_restarts=job.max_restarts,
        stage=_stage(job),
        seed=seed,
        launch=_launch(job),
        job_id=JOB_IDS[site.scheduler][bool(job.request.array)],
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _directives(job: Job) -> list[str]:
    return {"slurm": _slurm_directives, "lsf": _lsf_directives, "none": lambda job: []}[job.site.scheduler](job)


def _of_site(job: Job) -> list[str]:
    """The directives that the site's file gives: account, queue, and its own."""
    site = job.site
    texts = [site.account_directive] if job.request.account else []
    if job.queue is not None:
        texts += site.queues[job.queue].directives if site.queues else [site.queue_directive]
    texts += site.directives
    texts += site.gpu_directives if job.gpus_per_node else ()
    return [text.format(**_fields(job), account=job.request.account, queue=job.queue) for text in texts]


def _features(job: Job) -> list[str]:
    staged = (
        job.site.node_local.features
        if job.site.node_local and (job.request.stage_environment or job.request.stage_data)
        else ()
    )
    return [*job.site.features, *staged]


def _slurm_directives(job: Job) -> list[str]:
    site = job.site
    log = "%x-%A_%a.out" if job.request.array else "%x-%j.out"
    options = [
        f"--job-name={job.name}",
        f"--output={_quoted(job.folder / log)}",
        "--open-mode=append",
        f"--nodes={job.request.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--cpus-per-task={job.cores_per_rank}",
        f"--time={clock(job.seconds)}",
        f"--signal=B:{site.warning.signal}@{site.warning.seconds}",
        "--requeue" if job.max_restarts else "--no-requeue",
    ]
    if _features(job):
        options.append(f"--constraint={_quoted('&'.join(_features(job)))}")
    if job.request.array:
        options.append(f"--array=0-{len(job.request.array) - 1}")
    return [f"#SBATCH {option}" for option in [*options, *_of_site(job)]]


def _lsf_directives(job: Job) -> list[str]:
    site = job.site
    hours, minutes = divmod(job.seconds // 60, 60)
    log = "%J.%I.out" if job.request.array else "%J.out"
    options = [
        f'-J "{job.name}[1-{len(job.request.array)}]"' if job.request.array else f"-J {job.name}",
        f"-o {_quoted(job.folder / f'{job.name}-{log}')}",
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
    lines = list(job.site.setup)
    if job.site.modules:
        lines.append(f"module load {' '.join(map(_quoted, job.site.modules))}")
    lines += [f'export {name}="{value}"' for name, value in _variables(job).items()]
    return "\n".join(lines)


def _stage(job: Job) -> str:
    """Shell lines that copy the environment and the data to the nodes' own disks."""
    if job.site.node_local is None or not (job.request.stage_environment or job.request.stage_data):
        return ""
    folder = job.site.node_local.path
    each = {
        "srun": f"srun --nodes={job.request.nodes} --ntasks={job.request.nodes} --ntasks-per-node=1",
        "jsrun": f"jsrun -n {job.request.nodes} -r 1 -a 1 -c 1",
        "mpirun": f"mpirun -np {job.request.nodes} --map-by ppr:1:node",
    }.get(job.site.launcher, "")
    stage = f"{each} bash jobs/templates/stage.sh".strip()
    lines = [
        "# To the disk of each node: thousands of ranks that read the same files are slow on a shared file system."
    ]
    if job.request.stage_environment is not None:
        archive = _quoted(job.request.stage_environment)
        if job.site.scheduler == "slurm":
            lines.append(f'{each} mkdir -p "{folder}" || exit 1')
            lines.append(f'sbcast -pf {archive} "{folder}/environment.tar.gz" || exit 1')
            archive = f'"{folder}/environment.tar.gz"'
        lines.append(f'{stage} environment {archive} "{folder}/environment" || exit 1')
    if job.request.stage_data is not None:
        lines.append(f'{stage} data {_quoted(job.request.stage_data)} "{folder}/data" || exit 1')
        lines += [f'export {name}="{folder}/data"' for name in DATA_VARIABLES]
    return "\n".join(lines)


def _launch(job: Job) -> str:
    python = _quoted(job.python)
    if job.request.stage_environment is not None and job.site.node_local is not None:
        python = f'"{job.site.node_local.path}/environment/bin/python"'
    run = ["-m experiments run", _quoted(job.request.config), "--results", _quoted(job.request.results)]
    for override in job.request.set:
        run += ["--set", _quoted(override)]
    if job.request.array:
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
