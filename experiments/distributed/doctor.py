"""`python -m experiments doctor`: looks in seconds for what makes jobs fail, and says what to change.

Works with one process, which needs no network, and under every launcher, as the job itself would be started.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import torch
import torch.distributed as dist

from data_loaders.workers import num_cores
from experiments.distributed.departure import end_on_failure, stop_process_group
from experiments.distributed.devices import binding, device_of, safe_start_method
from experiments.distributed.interfaces import interface_addresses
from experiments.distributed.launch import ranks_from_environment, start_process_group
from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import Deadline
from experiments.settings.launch_settings import LaunchSettings

SITES = Path(__file__).parents[2] / "jobs" / "sites"
TOKEN_SECONDS = 10.0
LITTLE_SPACE_BYTES = 2**30
SKEW_SECONDS = 1.0
SIZES_BYTES = (2**12, 2**20, 2**24)
SECTIONS = ("ranks", "environment")  # of the file of a site, which are compared
ROWS = 16  # of a list by rank, before it is cut

ReadSite = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One row of the table; with a cure where something should change, which fails the examination if it is `bad`."""

    what: str
    found: str
    cure: str = ""
    bad: bool = False


def main(options: argparse.Namespace, read_site: ReadSite | None = None) -> int:
    """Prints the table on rank 0.

    Args:
        options: of the command line, see `experiments.__main__.add_doctor_arguments`.
        read_site: reads the YAML file of a site; needed with --site alone.

    Returns:
        0, or 1 if something must change.

    Raises:
        ValueError: an option is wrong.
        OSError: the file of the site cannot be read, or the folder of results cannot be written.
    """
    site = _site(options.site, read_site)
    if not options.start_seconds > 0:
        raise ValueError(f"--start-seconds must be positive, got {options.start_seconds}")
    settings = LaunchSettings(start_seconds=options.start_seconds, share_devices=True)
    try:
        ranks = ranks_from_environment(os.environ)
    except ValueError as error:
        return _report([Finding("launcher", "refused", str(error), bad=True), *_alone(options.results)])
    with end_on_failure(ranks):
        if ranks.rank == 0:
            _probe_folder(options.results)
        start_process_group(ranks, settings, options.results)
        try:
            findings = _examine(ranks, options, site)
        finally:
            stop_process_group(ranks)
    return _report(findings) if ranks.rank == 0 else int(any(finding.bad for finding in findings))


def _site(name: str | None, read_site: ReadSite | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    assert read_site is not None  # of the command line
    names = sorted(path.stem for path in SITES.glob("*.yaml"))
    of_user = name.endswith((".yaml", ".yml"))
    if not of_user and name not in names:
        raise ValueError(f"--site must be one of {', '.join(names)}, or a file that ends in .yaml, got {name!r}")
    path = Path(name) if of_user else SITES / f"{name}.yaml"
    try:
        site = read_site(path)
    except OSError as error:
        raise OSError(f"--site {path} cannot be read: {error.strerror or error}") from None
    for key in SECTIONS:
        if not isinstance(site.get(key) or {}, Mapping):
            raise ValueError(f"{path}: {key} must be a mapping of settings, got {site[key]!r}")
    if "scheduler" not in site or "launcher" not in site:
        raise ValueError(
            f"{path} must be the file of a site, with scheduler and launcher, as those of {SITES.name}/ are"
        )
    return site


def _alone(results: Path) -> list[Finding]:
    """What one process can tell although its launcher is in disorder."""
    return [*_versions([_facts(Ranks(), results)]), *_storage(Ranks(), results)]


def _probe_folder(results: Path) -> None:
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise OSError(f"the results folder {results} cannot be written: {error.strerror or error}") from None


def _examine(ranks: Ranks, options: argparse.Namespace, site: Mapping[str, Any]) -> list[Finding]:
    """All findings, the same on every rank."""
    facts = _gather(ranks, _facts(ranks, options.results))
    places = binding(ranks)
    findings = [
        *_versions(facts),
        *_launch(ranks, facts),
        *_places(places, facts),
        *_shared_folder(ranks, options.results),
        *(_storage(ranks, options.results) if ranks.rank == 0 else []),
        *_clocks(ranks),
        *_bandwidth(ranks, options.floor),
        *_traps(facts),
        *_compare_site(site, ranks, facts),
    ]
    box = [findings]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather(ranks: Ranks, own: Any) -> list[Any]:
    if ranks.world_size == 1:
        return [own]
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, own)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _facts(ranks: Ranks, results: Path) -> dict[str, Any]:
    """What one rank knows of itself; plain values, which travel to rank 0."""
    mpi = sys.modules.get("mpi4py.MPI")
    names = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "TMPDIR", "LSB_JOBID", "NCCL_SOCKET_IFNAME",
             "GLOO_SOCKET_IFNAME", "TORCHELASTIC_RUN_ID", "HDF5_USE_FILE_LOCKING")  # fmt: skip
    gpu = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu and dist.is_nccl_available() else "none"
    ssh = Path.home() / ".ssh" / "config"
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "CUDA": torch.version.cuda or "none",
            "ROCm": torch.version.hip or "none",
            "NCCL": nccl,
            "mpi4py": _version("mpi4py"),
            "MPI library": mpi.Get_library_version().split(",")[0].splitlines()[0] if mpi else "not in use",
            "h5py": h5py.__version__,
            "HDF5": h5py.version.hdf5_version,
        },
        "host": ranks.host or socket.gethostname(),
        "gpus": torch.cuda.device_count() if gpu else 0,
        "cores": num_cores(),
        "interfaces": {name: ", ".join(entries) for name, entries in interface_addresses().items()},
        "name": _resolved(socket.gethostname()),
        "start method": _start_methods(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
        "all_environment": sorted(os.environ),
        "open ssh": ssh.exists() and bool(ssh.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)),
        "local_size": ranks.local_size,
    }


def _start_methods() -> str:
    """How workers start here, and whether a wish for fork is granted."""
    granted = safe_start_method("fork")
    text = "" if granted == "fork" else f"; {granted} also where fork is wished, for MPI or a GPU is in use"
    return safe_start_method() + text


def _resolved(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "does not resolve"


def _who(ranks: Sequence[int], total: int) -> str:
    return "all ranks" if len(ranks) == total and total > 1 else f"rank {', '.join(map(str, ranks[:8]))}"


def _versions(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for name in facts[0]["versions"]:
        values = [fact["versions"][name] for fact in facts]
        if len(set(values)) == 1:
            findings.append(Finding(name, values[0]))
        else:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            findings.append(
                Finding(
                    name,
                    f"{values[0]} on rank 0, {values[other]} on rank {other}",
                    "load the same modules and environment on every node",
                    bad=name not in ("NCCL", "MPI library"),
                )
            )
    return findings


def _launch(ranks: Ranks, facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    by_host: dict[str, int] = {}
    for fact in facts:
        by_host[fact["host"]] = by_host.get(fact["host"], 0) + 1
    counts = sorted(set(by_host.values()))
    uneven = f", {counts[0]} to {counts[-1]} a host" if len(counts) > 1 else ""
    text = f"{ranks.launcher}, {ranks.world_size} ranks on {len(by_host)} hosts{uneven}"
    job = f"{ranks.scheduler} {ranks.job_id}".strip() + (f", step {ranks.step_id}" if ranks.step_id else "")
    job += f", restart {ranks.restart_count}" if ranks.restart_count else ""
    rows = [Finding("launcher", text), Finding("scheduler and job", job)]
    if ranks.world_size > 1:
        rows.append(Finding("backend", str(dist.get_backend())))
    return rows


def _places(places: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Where each rank is, and ranks that take each other's cores or GPU."""
    findings = [
        Finding(
            f"rank {place['rank']}",
            f"{place['host']}, local rank {place['local_rank']}, cores {place['cores']}, {place['device']}"
            + (f" {place['device_id']}" if place["device_id"] else "")
            + (f", {place['interface']}" if place["interface"] else ""),
        )
        for place in places[:ROWS]
    ]
    if len(places) > ROWS:
        findings.append(Finding("more ranks", f"{len(places) - ROWS}, examined like these"))
    shared = _groups((place["host"], place["device_id"]) for place in places if place["device_id"])
    for (host, device), owners in shared.items():
        if len(owners) > 1:
            cure = "give each rank its own: srun --gpus-per-task=1 or --gpus-per-node, jsrun -g"
            findings.append(Finding("GPU", f"ranks {owners} share {device} on {host}", cure, bad=True))
    crowded = _groups((place["host"], place["cores"]) for place in places)
    for (host, cores), owners in crowded.items():
        count = facts[owners[0]]["cores"]
        if len(owners) > count:
            cure = f"give each rank its own cores: srun -c, jsrun -c and -b packed, mpiexec --bind-to; here {count}"
            findings.append(Finding("binding", f"{len(owners)} ranks on the cores {cores} of {host}", cure))
    threads = [
        rank for rank, (place, fact) in enumerate(zip(places, facts, strict=True)) if place["threads"] > fact["cores"]
    ]
    if threads:
        found = f"{places[threads[0]]['threads']} threads on {facts[threads[0]]['cores']} cores"
        cure = "set OMP_NUM_THREADS to the cores of a rank"
        findings.append(Finding("threads", f"{_who(threads, len(facts))}: {found}", cure, bad=True))
    else:
        findings.append(Finding("threads", f"{places[0]['threads']} on {facts[0]['cores']} cores"))
    findings.append(Finding("start method of workers", facts[0]["start method"]))
    return findings


def _groups(keys: Any) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for rank, key in enumerate(keys):
        groups.setdefault(key, []).append(rank)
    return groups


def _shared_folder(ranks: Ranks, results: Path) -> list[Finding]:
    """Rank 0 writes a token, which all others must read: a folder of one node alone shows only here."""
    if ranks.world_size == 1:
        return []
    token = secrets.token_hex(8)
    path = results / f".doctor-{ranks.job_id or os.getpid()}"
    box: list[Any] = [token, str(path)]
    if ranks.rank == 0:
        with contextlib.suppress(OSError):
            path.write_text(token)
    dist.broadcast_object_list(box, src=0)
    seen, end = False, Deadline(TOKEN_SECONDS)
    while not seen and end.pause():
        with contextlib.suppress(OSError):
            seen = Path(box[1]).read_text() == box[0]
    blind = [rank for rank, found in enumerate(_gather(ranks, seen)) if not found]
    if ranks.rank == 0:
        path.unlink(missing_ok=True)
    if not blind:
        return [Finding("shared folder", f"all ranks read in {results}")]
    cure = "use a folder that all nodes see, with --results"
    return [Finding("shared folder", f"{_who(blind, ranks.world_size)} cannot read in {results}", cure, bad=True)]


def _storage(ranks: Ranks, results: Path) -> list[Finding]:
    """Locks of HDF5 and free space where the results go."""
    findings = []
    folder = results if results.exists() else Path()
    without_locks = "export HDF5_USE_FILE_LOCKING=FALSE in the job script, before Python starts"
    try:
        _probe_hdf5(folder, locking=False)  # as the suite opens its records
    except OSError as error:
        number = error.errno or _errno_in(str(error))
        cure = without_locks if "lock file" in str(error) else "choose another folder with --results"
        findings.append(Finding("HDF5 files", f"{folder}: {os.strerror(number) if number else error}", cure, bad=True))
    else:
        try:
            findings.append(Finding("HDF5 files", f"files can be written; {_probe_hdf5(folder, locking=None)}"))
        except OSError as error:
            number = error.errno or _errno_in(str(error))
            text = f"files can be written without locks, but not with them: {os.strerror(number) if number else error}"
            findings.append(Finding("HDF5 files", text, f"{without_locks}, if other programs open records there"))
    free = shutil.disk_usage(folder).free
    cure = "make room, or choose another folder with --results" if free < LITTLE_SPACE_BYTES else ""
    findings.append(Finding("free space", f"{free / 2**30:.1f} GiB in {folder.resolve()}", cure, bad=bool(cure)))
    return findings


def _probe_hdf5(folder: Path, locking: bool | None) -> str:
    """Writes a file, with HDF5's default of a lock where `locking` is None; says if a second writer is refused."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as inside:
        path = Path(inside) / "probe.h5"
        with h5py.File(path, "w", locking=locking) as file:
            file["x"] = 1
            file.flush()
            with path.open("rb") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return "a second writer is refused"
    return "no lock is taken, so nothing refuses a second writer"


def _errno_in(text: str) -> int:
    match = re.search(r"errno = (\d+)", text)
    return int(match[1]) if match else 0


def _clocks(ranks: Ranks) -> list[Finding]:
    if ranks.world_size == 1:
        return []
    skews = []
    for _ in range(5):
        dist.barrier()
        times = _gather(ranks, time.time())
        skews.append(max(times) - min(times))
    skew = min(skews)  # the others measure how late ranks left the barrier, too
    cure = "have the clocks of the nodes set (chrony, ntp)" if skew > SKEW_SECONDS else ""
    return [Finding("clocks", f"within {skew * 1e3:.0f} ms of each other", cure)]


def _bandwidth(ranks: Ranks, floor: float | None) -> list[Finding]:
    """Bus bandwidth of all_reduce, 2 (n - 1) / n bytes / seconds, which does not depend on the number of ranks."""
    if ranks.world_size == 1:
        return []
    device, best, parts = device_of(ranks), 0.0, []
    if dist.get_backend() == "gloo":
        device = torch.device("cpu")
    for size in SIZES_BYTES:
        values = torch.zeros(size // 4, device=device)
        seconds = min(_time_all_reduce(values) for _ in range(4))
        bandwidth = 2 * (ranks.world_size - 1) / ranks.world_size * size / seconds / 1e9
        best = max(best, bandwidth)
        parts.append(f"{size // 1024} KiB {seconds * 1e3:.2f} ms {bandwidth:.2f} GB/s")
    slow = floor is not None and best < floor
    cure = f"below --floor {floor:g}: see NCCL_DEBUG=INFO for the network in use, and launch.interface" if slow else ""
    return [Finding("all_reduce", "; ".join(parts), cure, bad=slow)]


def _time_all_reduce(values: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _traps(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is known to fail on some sites."""
    findings: list[Finding] = []

    def trap(what: str, cure: str, is_trap: Callable[[Mapping[str, Any]], str], *, bad: bool = True) -> None:
        found = {rank: text for rank, fact in enumerate(facts) if (text := is_trap(fact))}
        if found:
            text = f"{_who(list(found), len(facts))}: {next(iter(found.values()))}"
            findings.append(Finding(what, text, cure, bad))

    trap(
        "TMPDIR under LSF",
        "unset TMPDIR in the job and before bsub: jsrun's daemons do not find each other with it",
        lambda fact: fact["environment"].get("TMPDIR", "") if "LSB_JOBID" in fact["environment"] else "",
        bad=False,
    )
    trap(
        "~/.ssh/config under LSF",
        "chmod go-w ~/.ssh/config: jobs end suspended with it",
        lambda fact: "writable by others" if fact["open ssh"] and "LSB_JOBID" in fact["environment"] else "",
        bad=False,
    )
    trap("cores of a task", "repeat -c on the line of srun, which some versions of Slurm do not inherit", _lost_cores)
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        cure = f"unset {variable}, or name an interface that is there"
        trap(variable, cure, partial(_no_interface, variable=variable))
    if len({fact["host"] for fact in facts}) > 1:
        trap(
            "name of the host",
            "nothing, as long as launch.interface is auto or names an interface",
            lambda fact: f"{fact['host']} is {fact['name']}" if not fact["name"][:1].isdigit() or
            fact["name"].startswith("127.") else "",
            bad=False,
        )  # fmt: skip
    return findings


def _lost_cores(fact: Mapping[str, Any]) -> str:
    wanted = fact["environment"].get("SLURM_CPUS_PER_TASK", "")
    if wanted.isdigit() and int(wanted) > fact["cores"]:
        return f"SLURM_CPUS_PER_TASK={wanted}, but {fact['cores']} may be used"
    return ""


def _no_interface(fact: Mapping[str, Any], variable: str) -> str:
    names = fact["environment"].get(variable, "")
    prefixes = names.lstrip("=").split(",")
    if not names or names.startswith("^") or any(own.startswith(p) for own in fact["interfaces"] for p in prefixes):
        return ""
    there = ", ".join(f"{name} {address}" for name, address in fact["interfaces"].items())
    return f"{names} is not among {there}"


def _compare_site(site: Mapping[str, Any], ranks: Ranks, facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the file of the site says, where this job differs."""
    if not site:
        return []
    findings = [Finding("site", str(site.get("title", "")))]
    if ranks.scheduler == "none" and site.get("scheduler", "none") != "none":
        findings.append(Finding("job", "none: what the site wants of one was not compared"))
        return findings
    launcher, per_node = site.get("launcher"), site.get("ranks") or {}
    own = {"mpich": "mpirun", "openmpi": "mpirun"}.get(ranks.launcher, ranks.launcher)
    if launcher is not None and own != launcher and ranks.world_size > 1:
        findings.append(Finding("launcher of the site", f"{launcher}, not {ranks.launcher}", f"start with {launcher}"))
    for what, want, have in (
        ("ranks a node", per_node.get("per_node"), facts[0]["local_size"] or None),
        ("cores of a rank", per_node.get("cores"), facts[0]["cores"]),
    ):
        if want is not None and have is not None and want != have:
            cure = "start as `python -m jobs.submit --dry-run` prints it"
            findings.append(Finding(what, f"{have}, the site file has {want}", cure))
    if per_node.get("gpus_per_node") and not facts[0]["gpus"]:
        cure = "load the modules of the site and ask for GPUs"
        findings.append(Finding("GPUs", f"none, the site file has {per_node['gpus_per_node']} a node", cure, bad=True))
    for name in site.get("environment") or {}:
        without = [rank for rank, fact in enumerate(facts) if name not in fact["all_environment"]]
        if without:
            findings.append(Finding(name, f"not set on {_who(without, len(facts))}", "export it as the site file does"))
    return findings


def _report(findings: Sequence[Finding]) -> int:
    """Prints the table and what to change; 1 if something must."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "!!" if finding.bad else " !" if finding.cure else "  "
        print(f"{mark} {finding.what:<{width}}  {finding.found}")
    cures = [finding for finding in findings if finding.cure]
    print()
    if not cures:
        print("nothing to change")
    for finding in cures:
        print(f"{'must' if finding.bad else 'may'} change: {finding.what}: {finding.cure}")
    sys.stdout.flush()
    return int(any(finding.bad for finding in findings))
