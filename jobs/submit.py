"""Renders a job script for a site, and submits it."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from jobs import check_versions

if __name__ == "__main__":
    check_versions()

from data_loaders.files import write_text
from experiments.settings.yaml_file import parse_setting, read_yaml
from jobs.request import Job, Request, make_job, read_request
from jobs.script import render
from jobs.site import Site, read_site, site_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Submits one experiment; returns 2 after a mistake of the user, and without a batch system the code of the job."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(given)
    return guarded(lambda: _submit(options, ["python", "-m", "jobs.submit", *given]))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.submit", description=__doc__)
    add_job_options(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each of which resumes the one before"
    )
    parser.add_argument("--array", metavar="seeds=0-9", help="a job array whose elements have one seed each")
    return parser


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; a mistake of the user becomes one sentence on stderr and exit code 2."""
    try:
        return command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command which submits has."""
    sites = ", ".join(site_names())
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file of experiments/configs, or of your own")
    add("--site", required=True, metavar="SITE", help=f"{sites}, or a file that ends in .yaml")
    add("--time", metavar="H:MM:SS", help="wall time of a job")
    add("--results", type=Path, default=Path("results"), metavar="DIR", help="folder (results)")
    add("--account", metavar="A", help="whom the site charges")
    add("--queue", metavar="Q", help="queue or partition (the site's first)")
    add("--ranks-per-node", type=int, metavar="N", help="ranks a node (the site's)")
    add("--cores-per-rank", type=int, metavar="N", help="cores a rank (the site's)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs a node, 0 to run on CPUs (the site's)")
    add("--name", metavar="NAME", help="name of the job (EXPERIMENT-SCALE)")
    add("--python", metavar="PATH", help="interpreter on the nodes (the site's, or the one that runs this)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, repeatable")
    add("--stage-environment", type=Path, metavar="ARCHIVE", help="packed environment, unpacked on each node's disk")
    add("--stage-data", type=Path, metavar="DIR", help="data, copied to each node's disk")
    add("--dry-run", action="store_true", help="print the script; submit and check the configuration later")


def _submit(options: argparse.Namespace, command: Sequence[str]) -> int:
    site = read_site(options.site)
    request = read_request(vars(options))
    job = drawn_job(site, request) if options.dry_run else checked_job(site, request)
    path = script_path(job)
    script = render(job, path, command)
    if options.dry_run:
        print(script, end="")
        return 0
    write_text(path, script, executable=True)
    print(path, file=sys.stderr)
    if site.scheduler == "none":
        return subprocess.run(["bash", path], check=False).returncode
    previous = None
    for _ in range(request.chain):
        previous = submit_script(site, path, previous)
        print(previous)
    return 0


def checked_job(site: Site, request: Request) -> Job:
    """The job of a request, after its configuration was read and checked as the job itself will do."""
    from experiments.catalog import load_config  # here, because they import torch
    from experiments.runs.runs_to_make import single_process_variants

    seeds = [f"seeds={','.join(map(str, request.array))}"] if request.array else []
    config = load_config(request.config, [*request.set, *seeds])
    job = make_job(site, request, f"{config.experiment}-{config.scale}", sys.executable)
    if job.ranks > 1:
        single_process_variants(config)
    return job


def drawn_job(site: Site, request: Request) -> Job:
    """The job of a request for a dry run: only names of the configuration are read, without torch."""
    names = read_yaml(request.config)
    for override in request.set:
        key, _, text = override.partition("=")
        if key.strip() in ("experiment", "scale"):
            names[key.strip()] = parse_setting(text)
    return make_job(site, request, f"{names.get('experiment')}-{names.get('scale')}", sys.executable)


def script_path(job: Job) -> Path:
    """Where a new script of the job is kept: `<results>/jobs/<name>-<UTC>.sh`."""
    return job.folder / f"{job.name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.sh"


# Variables of the submitting shell that would change the job. To a batch system they count more than the lines of a
# script (SBATCH_TIMELIMIT), and what another job, step or launcher left there would be taken for this job's.
INHERITED = re.compile(
    "(SBATCH|SLURM|SRUN|SALLOC|LSB|PMI|PMI2|PMIX|OMPI_COMM_WORLD|JSM|PALS|MV2_COMM_WORLD|TORCHELASTIC)_.*|MPI_LOCAL.*|"
    "(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|"
    "(CUDA|ROCR|HIP)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK|"
    "AADL_(END_TIME|STOPPED_FILE|RESTART_COUNT|JOB_ID)"
)
NEEDED = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # how sbatch finds its controller
OPTIONS_OF_THE_SHELL = ("SBATCH_", "LSB_DEFAULT")


def submission_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what the batch system and the job may know of the submitting shell."""
    return {name: text for name, text in environment.items() if name in NEEDED or not INHERITED.fullmatch(name)}


def _warn_of_options(environment: Mapping[str, str]) -> None:
    names = sorted(name for name in environment if name.startswith(OPTIONS_OF_THE_SHELL))
    if names:
        print(
            f"note: {', '.join(names)} of this shell do not count; options of the command line and the site's file do",
            file=sys.stderr,
        )


def submit_script(site: Site, path: Path, after: str | None = None) -> str:
    """Submits a script, after the end of another job if there is one; returns the id of the job.

    Raises:
        ValueError: a variable is set that the site does not bear.
        OSError: the scheduler is missing or refuses the job; the message is its own.
    """
    for name in site.refused_variables:
        if name in os.environ:
            raise ValueError(
                f"{name} must not be set when a job is submitted to {site.name}: type `unset {name}` first"
            )
    if site.scheduler == "slurm":
        command = ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else [])]
    else:
        command = ["bsub", *(["-w", f"ended({after})"] if after else [])]
    _warn_of_options(os.environ)
    text = path.read_text(encoding="utf-8") if site.submit == "stdin" else None
    try:
        done = subprocess.run(
            command if text is not None else [*command, str(path)],
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            check=False,
            env=submission_environment(os.environ),
        )
    except FileNotFoundError:
        raise OSError(
            f"{command[0]} was not found: submit on a login node of {site.name}, where {path} can be submitted by hand "
            "too, or see the script with --dry-run"
        ) from None
    # Around the answer, sites' own wrappers print notes; a cluster of several follows the id of Slurm with its name.
    pattern = r"(?m)^(\d+)(?:;\S+)?$" if site.scheduler == "slurm" else r"Job <(\d+)>"
    match = re.search(pattern, done.stdout)
    if done.returncode != 0 or match is None:
        answer = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise OSError(f"{command[0]} refused {path}: {answer}")
    return match[1]


if __name__ == "__main__":
    sys.exit(main())
