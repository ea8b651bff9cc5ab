"""Steps that write to no parameter, on several ranks: all count alike, and such a step judges no candidate."""

import parallel_runs
import torch
from small_runs import identical

import aadl

ONCE = parallel_runs.RESIDUAL | parallel_runs.CALM
SELDOM = ONCE | {"frequency": 6}
LAYOUTS = {
    "replicas": (parallel_runs.replica, {}),
    "shared history": (parallel_runs.replica, {"shard_history": True}),
    "sharded": (parallel_runs.sharded, {}),
}


def go_on(rank, size, wrap, settings, is_empty, steps=60):
    """Train; in the steps for which is_empty(step) holds, no parameter has a gradient."""
    model = wrap(parallel_runs.network(), rank, size)
    optimizer = parallel_runs.gentle_momentum(model.parameters())
    if settings is not None:
        aadl.accelerate(optimizer, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        parallel_runs.part_of_batch(model, rank, size).backward()
        if is_empty(step):
            optimizer.zero_grad()
        optimizer.step()
    found = {"weights": parallel_runs.values_of(model)}
    return found if settings is None else found | {"statistics": parallel_runs.statistics_of(optimizer)}


def all_runs(rank, size):
    results = {}
    for name, (wrap, more) in LAYOUTS.items():
        results[name, "plain"] = go_on(rank, size, wrap, None, lambda step: step % 3 > 0)
        results[name, "often"] = go_on(rank, size, wrap, ONCE | more, lambda step: step % 3 > 0)
        results[name, "twice"] = go_on(rank, size, wrap, SELDOM | more, lambda step: step in (20, 40))
        long = ONCE | {"store_each_nth": 4, "frequency": 8}
        results[name, "within"] = go_on(rank, size, wrap, long | more, lambda step: step % 3 > 0, steps=120)
    results["alone"] = go_on(rank, size, parallel_runs.replica, ONCE, lambda step: rank == 0 and step % 5 == 3)
    return results


def test_ranks_count_empty_steps_alike_and_take_them_for_changes(spawn_ranks):
    outcomes = spawn_ranks(all_runs, 2)
    for key, ours in outcomes[0].items():
        both = [outcome[key] for outcome in outcomes]
        if "plain" in key:
            continue
        assert identical(both[0]["statistics"], both[1]["statistics"]), key
        assert ours["statistics"]["skipped_steps"] == 0 and ours["statistics"]["steps"] in (60, 120), key
        assert key == "alone" or parallel_runs.agree(both), key
    for name in LAYOUTS:
        first = outcomes[0]
        assert torch.equal(first[name, "often"]["weights"], first[name, "plain"]["weights"]), name
        assert first[name, "often"]["statistics"]["attempts"] == 0, name
        assert first[name, "twice"]["statistics"]["moved"] == 2 < first[name, "twice"]["statistics"]["attempts"], name
        assert first[name, "within"]["statistics"]["moved"] == 0, name  # every macro-step has a step
        assert first[name, "within"]["statistics"]["attempts"] > 0, name
