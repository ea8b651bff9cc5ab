"""benchmarks.scaling: what is counted, the arithmetic of the machine model, the page."""

import itertools
import math
import shutil
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from benchmarks import fake_ranks, scaling
from benchmarks.fake_ranks import Case, Count, Recorder, count_all
from benchmarks.machine_model import (
    LAYOUTS,
    MACHINES,
    MOVED,
    WORKLOADS,
    Collective,
    Events,
    Workload,
    acceleration_seconds,
    collective_seconds,
    history_bytes,
    local_elements,
    plain_seconds,
    training_collectives,
)
from benchmarks.shapes import count_elements, decoder_units, resnet50_units
from benchmarks.tables import REPORTS, put_into_page

TINY = Workload("tiny", (((300, 40), (300,)), ((100, 300), (100,))), 12, 20, 4, True)
RANKS = 1536
GRAM = Collective("all_reduce", 616)
SUMMIT = MACHINES[0]
RESNET = WORKLOADS[0]
NOTHING = Events((), (), ())


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_networks_have_their_published_size():
    units = resnet50_units()
    assert (len(units), sum(map(len, units)), count_elements(units)) == (18, 161, 25_557_032)
    assert count_elements(decoder_units()) == 7_000_559_616


def test_fsdp2_leaves_rank_zero_more_than_its_part():
    assert local_elements(TINY.units, "fsdp2", RANKS) == 40 + 1 + 300 + 1
    assert local_elements(TINY.units, "fsdp2", 1) == TINY.elements
    assert local_elements(TINY.units, "sharded", RANKS) == math.ceil(TINY.elements / RANKS)
    assert local_elements(TINY.units, "replicated", RANKS) == TINY.elements


# ---- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["sharded", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "sharded")]
)
def test_every_layout_is_counted_on_one_rank_of_thousands(layout):
    (count,) = count_all([Case(TINY, layout, RANKS, depth=3)])
    held = local_elements(TINY.units, layout, RANKS)
    formula = history_bytes(3) * held
    assert count.history_bytes >= formula
    assert count.history_bytes < 2 * formula + 200_000  # work areas
    assert count.local_elements == (held if layout == "fsdp2" else TINY.elements)
    modeled = training_collectives(TINY, layout, RANKS) if layout == "fsdp2" else []
    assert Counter(count.training) == Counter(modeled)
    assert all(each.payload < 10_000 for each in count.events.acceleration) or layout == "sharded"
    if layout != "replicated":
        assert "all_reduce" in {each.operation for each in count.events.acceleration}
    if layout == "sharded":
        gathered = sum(each.payload for each in count.events.acceleration if each.operation == "all_gather")
        assert 8 * TINY.elements <= gathered <= 8 * (TINY.elements + 8 * RANKS)


def test_what_cannot_be_counted_is_an_error_that_names_the_case(monkeypatch):
    def refuse(function, case):
        raise ValueError("this library cannot shard")

    monkeypatch.setattr(fake_ranks, "in_fresh_process", refuse)
    with pytest.raises(RuntimeError, match=r"'sharded' cannot be counted \(tiny, .*1,536 ranks.*cannot shard"):
        count_all([Case(TINY, "sharded", RANKS)])


def test_collectives_of_an_optimizer_hook_are_recorded():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, recorder = torch.optim.SGD([parameter], lr=0.1), Recorder()
    descent = fake_ranks.Descent([parameter])
    fake_ranks.join_fake_group(RANKS)
    try:
        plain = fake_ranks.recorded_step(descent, optimizer, recorder)
        optimizer.register_step_post_hook(lambda *_: dist.all_reduce(torch.zeros(77, dtype=torch.float64)))
        optimizer.register_step_post_hook(lambda *_: dist.all_gather(list(torch.empty(RANKS, 3)), torch.ones(3)))
        hooked = fake_ranks.recorded_step(descent, optimizer, recorder)
        dist.all_reduce(torch.zeros(1))  # outside of a step
        assert recorder.take() == ()
    finally:
        dist.destroy_process_group()
    assert plain == ()
    assert hooked == (GRAM, Collective("all_gather", 12 * RANKS))


def test_large_networks_are_run_only_where_they_fit():
    cases = fake_ranks.cases_of(LAYOUTS, (8, 16), WORKLOADS)
    large = [case for case in cases if case.workload.elements > 1e9]
    assert [(case.layout, case.ranks) for case in large] == [("fsdp2", 8), ("fsdp2", 16)]
    assert {case.layout for case in cases if case not in large} == set(LAYOUTS)


# ---- machine model ---------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_floor():
    assert history_bytes(10) == 2 * 92 and history_bytes(5) == 2 * 52
    assert Events(2 * 28, 2 * 92, 2 * 8) == MOVED


def test_collectives_cost_latency_and_bandwidth():
    word, whole = Collective("all_reduce", 8), Collective("all_gather", 10**9)
    assert collective_seconds(SUMMIT, word, 1) == 0
    seconds = [collective_seconds(SUMMIT, word, ranks) for ranks in (2, 6, 12, 1536, 6144)]
    assert seconds == sorted(seconds)
    assert seconds[0] < 10e-6 and 50e-6 < seconds[-1] < 200e-6  # a tree: logarithmic
    assert collective_seconds(SUMMIT, whole, 6) == pytest.approx(5 / 6 / 50 / 0.85, rel=0.01)
    assert collective_seconds(SUMMIT, whole, 12) == pytest.approx(11 / 12 / 23 / 0.85, rel=0.01)


def test_the_plain_step_is_near_the_published_scaling_of_summit():
    assert plain_seconds(SUMMIT, RESNET, "replicated", 1) == pytest.approx(32 / 1040)
    efficiency = plain_seconds(SUMMIT, RESNET, "replicated", 1) / plain_seconds(SUMMIT, RESNET, "replicated", 6144)
    assert 0.8 < efficiency < 0.9  # 87 % published


def test_prediction_by_hand():
    """V100: 184 bytes twice a period of 20 and two stores of 56, 16 for the judgment, at 900 / 1.3 GB/s."""
    moved = RESNET.elements * (2 * 56 + 184 + 16) / 20 / (900e9 / 1.3)
    place = (SUMMIT, RESNET, "replicated")
    assert acceleration_seconds(*place, 1, NOTHING, Events(0.0, 0.0, 0.0)) == pytest.approx(moved)
    fixed = 2e-3 / 10 + (3e-3 + 5e-3) / 20
    assert acceleration_seconds(*place, 1, NOTHING, Events(2e-3, 3e-3, 5e-3)) == pytest.approx(moved + fixed)
    reduced = acceleration_seconds(*place, RANKS, Events((), (GRAM, GRAM), ()), Events(0.0, 0.0, 0.0))
    assert reduced == pytest.approx(moved + 2 * collective_seconds(SUMMIT, GRAM, RANKS) / 20)
    sharded = acceleration_seconds(SUMMIT, RESNET, "sharded", RANKS, NOTHING, Events(0.0, 0.0, 0.0))
    assert sharded == pytest.approx(moved / RANKS + RESNET.elements * 16 / 20 / (900e9 / 1.3), rel=1e-3)


# ---- this host and the page ------------------------------------------------------------------------------------------


def test_events_of_every_kind_are_timed(monkeypatch):
    steps = itertools.count()

    def seconds(descent, optimizer):
        descent.set_gradients()
        optimizer.step()
        return float(next(steps) % 2 == 0)  # the accelerated step comes first: a second more than the plain one

    monkeypatch.setattr(scaling, "step_seconds", seconds)
    assert scaling.measure_overhead() == Events(1.0, 0.0, 0.0)


def test_the_page_takes_every_table(tmp_path):
    cases = fake_ranks.cases_of(LAYOUTS, scaling.WORLD_SIZES, WORKLOADS)
    counts = [Count(case, 10, 10, (), Events((), (GRAM,), ())) for case in cases]
    shutil.copy(REPORTS / "scaling.md", tmp_path)
    put_into_page("scaling", scaling.blocks_of(counts, Events(1e-4, 1e-3, 1e-4)), tmp_path, scaling.conclusion)
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if "| H100 SXM | 6,144 |" in line]
    assert len(rows) == len(LAYOUTS) + 1  # fsdp2 alone holds 7e9
    assert "acceleration 1, judgment 0.1." in text and torch.__version__ in text
