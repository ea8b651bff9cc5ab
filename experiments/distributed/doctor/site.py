"""What is known to fail on some sites, and what the file of the site says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.distributed.doctor.facts import Finding, who
from experiments.distributed.ranks import Ranks
from experiments.settings.yaml_file import read_yaml

SITES = Path(__file__).parents[3] / "jobs" / "sites"
SECTIONS = ("ranks", "environment")  # of the file of a site, which are compared


def read_site_file(name: str | None) -> Mapping[str, Any]:
    """Reads the file of a site, by its name or path; {} for None."""
    if name is None:
        return {}
    names = sorted(path.stem for path in SITES.glob("*.yaml"))
    of_user = name.endswith((".yaml", ".yml"))
    if not of_user and name not in names:
        raise ValueError(f"--site must be one of {', '.join(names)}, or a file that ends in .yaml, got {name!r}")
    path = Path(name) if of_user else SITES / f"{name}.yaml"
    try:
        site = read_yaml(path)
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


def traps(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Reports what is known to fail on some sites."""
    findings: list[Finding] = []

    def trap(what: str, cure: str, is_trap: Callable[[Mapping[str, Any]], str], *, bad: bool = True) -> None:
        found = {rank: text for rank, fact in enumerate(facts) if (text := is_trap(fact))}
        if found:
            text = f"{who(list(found), len(facts))}: {next(iter(found.values()))}"
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


def compare_site(site: Mapping[str, Any], ranks: Ranks, facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Reports where this job differs from the file of the site."""
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
            findings.append(Finding(name, f"not set on {who(without, len(facts))}", "export it as the site file does"))
    return findings
