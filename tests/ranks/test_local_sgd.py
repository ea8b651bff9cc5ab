"""Local SGD: weights of the ranks differ between averagings; they vote, or go to one average together."""

import math
import warnings
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from parallel_runs import CALM, LOSS, RESIDUAL, gentle_adam, part_of_batch, run, statistics_of, values_of
from torch.distributed.algorithms.model_averaging import averagers

import aadl
from aadl import acceptance, trial_loss
from aadl.decisions import Decisions
from aadl.history import History

with warnings.catch_warnings():  # torch.jit, which the package compiles with, is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import PostLocalSGDOptimizer

SETTINGS = CALM | RESIDUAL | {"store_each_nth": 2, "frequency": 2}
STEPS = 40
AVERAGED_AFTER = (6, 21, 36)
"""Averagings of the averagers below; the second lies within a macro-step that began at the first."""


def averager():
    return averagers.PeriodicModelAverager(period=15, warmup_steps=5)


def averaging(rank, settings, *, post_local=False, **more):
    """A run whose weights are averaged after AVERAGED_AFTER: by torch's optimizer, or beside any optimizer."""
    beside = averager()

    def make(parameters):
        optimizer = gentle_adam(parameters)
        return PostLocalSGDOptimizer(optimizer, averager()) if post_local else optimizer

    columns = []

    def average(step, model, optimizer):
        history = aadl.accelerator_of(optimizer).history
        columns.append(0 if history is None else len(history.columns))
        if not post_local:
            beside.average_parameters(model.parameters())

    result = run(
        rank, dist.get_world_size(), settings, make=make, loss=part_of_batch, steps=STEPS, after=average, **more
    )  # fmt: skip
    return result | {"columns": columns}


@contextmanager
def opinions(willing):
    """Every event finds a candidate; willing(number of the event) says whether it points the right way."""
    combine, events = History.combine, []

    def decide(self, *args):
        combine(self, *args)
        events.append(None)
        return torch.tensor(1.0 if willing(len(events)) else -1.0)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(History, "combine", decide))
        stack.enter_context(mock.patch.object(Decisions, "is_paused", lambda self: False))
        stack.enter_context(mock.patch.object(acceptance, "must_revert", lambda *_: False))
        yield


def vote(rank):
    """Event 1, 3, ...: all but rank 3 are willing; event 2, 4, ...: only ranks 0 and 1, which is no majority."""
    settings = SETTINGS | {"local_sgd": True}
    taken = []

    def note(step, model, optimizer):
        taken.append(statistics_of(optimizer)["accepted"])

    result = run(
        rank, 4, settings, make=gentle_adam, loss=part_of_batch, steps=20, after=note,
        context=lambda: opinions(lambda event: rank < 3 if event % 2 else rank < 2),
    )  # fmt: skip
    return result | {"taken": taken}


@contextmanager
def losses(plain, candidate):
    trial = trial_loss.trial_losses

    def give(*args, **more):
        trial(*args, **more)
        return plain, candidate

    with mock.patch.object(trial_loss, "trial_losses", give):
        yield


def judge(rank, change, weight=1.0):
    """Loss-judged; the trial losses of this rank are 1 at the plain point and 1 + change at the candidate."""
    gaps = []

    def weigh(step, model, optimizer):
        aadl.accelerator_of(optimizer).loss_weight = weight
        own = values_of(model)
        mean = own.clone()
        dist.all_reduce(mean)
        gaps.append((statistics_of(optimizer)["accepted"], float((mean / 4 - own).abs().max())))

    settings = CALM | LOSS | {"store_each_nth": 2, "frequency": 6, "local_sgd": True}
    result = run(
        rank, 4, settings, make=gentle_adam, loss=part_of_batch, closure=True, steps=30, after=weigh,
        context=lambda: losses(1.0, 1.0 + change),
    )  # fmt: skip
    return result | {"gaps": gaps}


def by_loss(rank):
    settings = CALM | LOSS | {"store_each_nth": 2, "frequency": 4, "local_sgd": True}
    return run(rank, 4, settings, make=gentle_adam, loss=part_of_batch, closure=True, steps=STEPS)


def poisoned(model, rank, size):
    value = part_of_batch(model, rank, size)
    return value * math.nan if rank == 1 else value


def lost(rank, closure):
    """Rank 1 has weights that are not finite from the first step on, and no pairs to mix."""
    settings = SETTINGS | {"local_sgd": True, "safeguard": "loss" if closure else "residual"}
    return run(rank, 4, settings, make=gentle_adam, loss=poisoned, closure=closure, steps=20)


def train(rank, size):
    own = [dist.new_group([member]) for member in range(size)][rank]
    return {
        "beside": averaging(rank, SETTINGS | {"local_sgd": True}),
        "post local": averaging(rank, SETTINGS, post_local=True),
        "unaware": averaging(rank, SETTINGS | {"process_group": own}),
        "by loss, averaged": averaging(rank, SETTINGS | {"local_sgd": True, "safeguard": "loss"}, closure=True),
        "vote": vote(rank),
        "mean loss": by_loss(rank),
        "improves": judge(rank, -0.5 if rank == 0 else 0.1),
        "weighted": judge(rank, -0.5 if rank == 0 else 0.1, weight=1.0 if rank == 0 else 4.0),
        "one NaN": judge(rank, math.nan if rank == 2 else -0.5),
        "lost": lost(rank, False),
        "lost by loss": lost(rank, True),
    }


def test_ranks_with_weights_of_their_own(spawn_ranks):
    outcomes = spawn_ranks(train, 4)
    check_averaging(outcomes)
    check_votes(outcomes)
    check_losses(outcomes)
    check_lost_rank(outcomes)


def check_averaging(outcomes):
    """The history starts again at every averaging, within a macro-step too."""
    for outcome in outcomes:
        for name in ("beside", "post local", "by loss, averaged"):
            assert outcome[name]["statistics"]["resets"] == {"averaged": len(AVERAGED_AFTER)}, name
        assert outcome["unaware"]["statistics"]["resets"] == {}
        columns = outcome["beside"]["columns"]  # after step i + 1
        for step in AVERAGED_AFTER:
            assert columns[step - 1] > 0
            assert columns[step : step + 3] == [0, 0, 0]  # two pairs make a column, two steps a pair
        assert torch.equal(outcome["beside"]["weights"], outcome["post local"]["weights"])
        assert not torch.equal(outcome["beside"]["weights"], outcome["unaware"]["weights"])
        assert outcome["beside"]["statistics"]["macro_steps"] == STEPS // 2  # all ranks go on counting together
    accepted = {outcome["beside"]["statistics"]["accepted"] for outcome in outcomes}
    assert max(accepted) > 0
    assert not torch.equal(outcomes[0]["beside"]["weights"], outcomes[1]["beside"]["weights"])


def check_votes(outcomes):
    results = [outcome["vote"] for outcome in outcomes]
    attempts = results[0]["statistics"]["attempts"]
    assert attempts >= 6
    first, second = attempts - attempts // 2, attempts // 2
    expected = [
        (first, {"vote": second}),
        (first, {"vote": second}),
        (first, {"backward": second}),
        (0, {"backward": attempts}),
    ]
    assert [(r["statistics"]["accepted"], r["statistics"]["rejected"]) for r in results] == expected
    assert results[0]["taken"] == results[1]["taken"] == results[2]["taken"]
    for result in results:
        own = [call for calls in result["own"] for call in calls]
        assert {name for name, _ in own} == {"all_reduce"}
        assert {size for _, size in own} == {8}
        assert len(own) >= attempts


def check_losses(outcomes):
    for name in ("mean loss", "improves", "weighted", "one NaN"):
        counters = [
            {k: outcome[name]["statistics"][k] for k in ("accepted", "closure_evaluations")} for outcome in outcomes
        ]
        assert all(counters[0] == other for other in counters), name
        assert counters[0]["closure_evaluations"] > 0, name
    assert outcomes[0]["mean loss"]["statistics"]["accepted"] > 0
    for outcome in outcomes:
        assert outcome["improves"]["statistics"]["accepted"] > 0  # -0.5 + 3 * 0.1 < 0
        assert outcome["weighted"]["statistics"]["accepted"] == 0  # -0.5 + 3 * 4 * 0.1 > 0
        assert outcome["weighted"]["statistics"]["rejected"].get("loss", 0) > 0
        assert outcome["one NaN"]["statistics"]["accepted"] == 0
        assert outcome["one NaN"]["statistics"]["rejected"].get("loss", 0) > 0
        before = 0
        for accepted, gap in outcome["improves"]["gaps"]:
            assert (gap < 1e-12) == (accepted > before)  # equal after an accepted candidate, at no other time
            before = accepted


def check_lost_rank(outcomes):
    for rank, outcome in enumerate(outcomes):
        for name in ("lost", "lost by loss"):
            assert bool(torch.isfinite(outcome[name]["weights"]).all()) == (rank != 1), name
        assert (outcome["lost"]["statistics"]["accepted"] > 0) == (rank != 1)  # three of four can
        assert outcome["lost by loss"]["statistics"]["accepted"] == 0
    assert outcomes[1]["lost"]["statistics"]["resets"].get("non_finite", 0) > 0
