"""Whether the ranks are alike, each has cores and a GPU of its own, and how they reach each other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from experiments.distributed.devices import device_of
from experiments.distributed.doctor.facts import Finding, groups, who
from experiments.distributed.ranks import Ranks

SIZES_BYTES = (2**12, 2**20, 2**24)
ROWS = 16  # of a list by rank, before it is cut


def versions(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
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


def launcher(ranks: Ranks, facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
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


def binding_of(places: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Reports where each rank is, and ranks that take each other's cores or GPU."""
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
    shared = groups((place["host"], place["device_id"]) for place in places if place["device_id"])
    for (host, device), owners in shared.items():
        if len(owners) > 1:
            cure = "give each rank its own: srun --gpus-per-task=1 or --gpus-per-node, jsrun -g"
            findings.append(Finding("GPU", f"ranks {owners} share {device} on {host}", cure, bad=True))
    crowded = groups((place["host"], place["cores"]) for place in places)
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
        findings.append(Finding("threads", f"{who(threads, len(facts))}: {found}", cure, bad=True))
    else:
        findings.append(Finding("threads", f"{places[0]['threads']} on {facts[0]['cores']} cores"))
    findings.append(Finding("start method of workers", facts[0]["start method"]))
    return findings


def bandwidth(ranks: Ranks) -> list[Finding]:
    """Reports the bus bandwidth of all_reduce, 2 (n - 1) / n bytes / seconds, which depends on no number of ranks."""
    if ranks.world_size == 1:
        return []
    device, parts = device_of(ranks), []
    if dist.get_backend() == "gloo":
        device = torch.device("cpu")
    for size in SIZES_BYTES:
        values = torch.zeros(size // 4, device=device)
        seconds = min(_time_all_reduce(values) for _ in range(4))
        bandwidth = 2 * (ranks.world_size - 1) / ranks.world_size * size / seconds / 1e9
        parts.append(f"{size // 1024} KiB {seconds * 1e3:.2f} ms {bandwidth:.2f} GB/s")
    return [Finding("all_reduce", "; ".join(parts))]


def _time_all_reduce(values: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
