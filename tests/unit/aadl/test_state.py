"""The vectors of a history as named tensors, and the rest of it as plain values."""

import copy
import json
import math

import pytest
import torch
from histories import filled_history, random_pairs
from small_runs import EAGER, identical

import aadl
from aadl.block import make_block
from aadl.history import History
from aadl.state import load_rows, rows_of

ONE = [[(0, torch.zeros(50))]]
"""Groups of a history of one vector."""


def test_rows_are_named_after_positions_and_shaped_like_the_parameters():
    templates = [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(7), torch.zeros(0, 3)]
    wide = [torch.zeros((), dtype=torch.complex128), torch.zeros(2, 3, dtype=torch.complex128)]
    blocks = [make_block(kind, part, 4, kind == "parameters", None)
              for kind in ("parameters", "momentum") for part in (templates, wide)]  # fmt: skip
    groups = [[(0, templates[0]), (2, templates[1]), (4, templates[2])], [(1, wide[0]), (3, wide[1])]]
    rows = rows_of(History(4, blocks), groups, False)
    shapes = {0: (2, 3, 4, 5), 1: (2,), 2: (7,), 3: (2, 3, 2), 4: (0, 3)}
    names = {"delta_mapped": (4,), "mapped": (), "start": ()}
    expected = {f"momentum.{i}.{name}": lead + shape for i, shape in shapes.items() for name, lead in names.items()}
    names |= {"delta_residual": (4,), "residual": ()}
    expected |= {f"parameters.{i}.{name}": lead + shape for i, shape in shapes.items() for name, lead in names.items()}
    assert {name: tuple(row.shape) for name, row in rows.items()} == expected
    assert sum(row.nbytes for row in rows.values()) == sum(block.nbytes for block in blocks)
    rows["parameters.3.mapped"].fill_(3.0)
    assert blocks[1].mapped.sum() == 36 and not blocks[0].mapped.any()  # views


def test_tensors_that_are_in_place_are_left_alone():
    """torch.distributed.checkpoint loads into the rows themselves."""
    history = filled_history(random_pairs(3))
    rows = rows_of(history, ONE, False)
    versions = [row._version for row in rows.values()]
    load_rows(rows, rows_of(history, ONE, False))
    assert [row._version for row in rows.values()] == versions
    load_rows({name: row.clone() for name, row in rows.items()}, rows_of(history, ONE, False))
    assert all(row._version > version for row, version in zip(rows.values(), versions, strict=True))


# ---- of accelerators -----------------------------------------------------------------------------------------------


def convolution(layout=torch.contiguous_format, dtype=torch.float64):
    torch.manual_seed(3)
    weight = torch.randn(4, 3, 3, 3, dtype=dtype).contiguous(memory_format=layout)
    return [torch.nn.Parameter(weight), torch.nn.Parameter(torch.ones((), dtype=dtype))]


def adam(parameters, settings=EAGER):
    return aadl.accelerate(torch.optim.Adam(parameters, lr=0.05), **settings)


def go(parameters, optimizer, steps):
    for _ in range(steps):
        for p in parameters:
            p.grad = (p.detach() - 0.5).abs().sqrt() * (p.detach() - 0.5).sign()
        optimizer.step()


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("first", FORMATS)
def test_a_state_continues_in_another_memory_format(first):
    """The inner products are summed in another order, hence the tolerance."""
    second = next(layout for layout in FORMATS if layout is not first)
    parameters = convolution(first)
    optimizer = adam(parameters)
    go(parameters, optimizer, 9)
    state = copy.deepcopy(optimizer.state_dict())
    others = []
    for with_history in (True, False):
        other = convolution(second)
        with torch.no_grad():
            for p, q in zip(other, parameters, strict=True):
                p.copy_(q)
        again = adam(other)
        if not with_history:
            del state["aadl"]
        again.load_state_dict(state)
        others.append((other, again))
    (other, again), (bare, without) = others
    accelerator = aadl.accelerator_of(again)
    for row, view in zip(
        *(aadl.accelerator_of(o).state_dict()["rows"].values() for o in (optimizer, again)), strict=True
    ):
        assert torch.equal(row, view)
    rows = [aadl.accelerator_of(o).history.blocks[0].mapped for o in (optimizer, again)]
    assert not torch.equal(*rows) and torch.equal(rows[0].sort().values, rows[1].sort().values)
    before = accelerator.statistics["accepted"], accelerator.statistics["moved"]
    for p, o in ((parameters, optimizer), (other, again), (bare, without)):
        go(p, o, 5)
    assert other[0].is_contiguous(memory_format=second)
    assert accelerator.statistics["accepted"] > before[0] and accelerator.statistics["moved"] == before[1]
    torch.testing.assert_close(other[0], parameters[0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(bare[0], parameters[0], rtol=1e-5, atol=1e-5)


def test_the_state_of_a_fresh_accelerator_has_the_entries_of_a_saved_one():
    """torch.distributed.checkpoint loads into what is there."""
    parameters = convolution()
    optimizer = adam(parameters)
    fresh = aadl.accelerator_of(optimizer).state_dict()
    shapes = {name: (row.shape, row.dtype) for name, row in fresh["rows"].items()}
    assert not any(row.any() for row in fresh["rows"].values())
    go(parameters, optimizer, 9)
    used = aadl.accelerator_of(optimizer).state_dict()
    assert fresh.keys() == used.keys() == {"version", "values", "rows"}
    assert {name: (row.shape, row.dtype) for name, row in used["rows"].items()} == shapes
    assert json.loads(fresh["values"]).keys() == json.loads(used["values"]).keys()
    kinds = {name.split(".")[0] for name in shapes}
    assert kinds == {"parameters", "momentum"} and len(shapes) == 20
    assert aadl.accelerator_of(adam(convolution(), EAGER | {"history_depth": 0})).state_dict()["rows"] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_state_of_scalars_and_complex_parameters_continues(dtype):
    ends = []
    for interrupted in (False, True):
        torch.manual_seed(4)
        parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(), (3, 2)]]
        optimizer = aadl.accelerate(torch.optim.SGD(parameters, lr=0.2, momentum=0.5), **EAGER)
        for step in range(14):
            if interrupted and step == 7:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = aadl.accelerate(torch.optim.SGD(parameters, lr=0.2, momentum=0.5), **EAGER)
                optimizer.load_state_dict(state)
            for p, weight in zip(parameters, (0.1, torch.arange(1.0, 7).view(3, 2) / 6), strict=True):
                p.grad = weight * p.detach()
            optimizer.step()
        ends.append([p.detach().clone() for p in parameters])
    assert aadl.accelerator_of(optimizer).statistics["accepted"] > 2
    assert all(map(torch.equal, *ends))


def test_statistics_that_are_not_numbers_survive():
    parameters = convolution()
    optimizer = adam(parameters)
    accelerator = aadl.accelerator_of(optimizer)
    assert math.isnan(accelerator.statistics["gain"])
    state = accelerator.state_dict()
    again = aadl.accelerator_of(adam(convolution()))
    go(parameters, optimizer, 9)
    assert not math.isnan(accelerator.statistics["gain"])
    accelerator.load_state_dict(copy.deepcopy(state))
    assert identical(accelerator.statistics, again.statistics)


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("steps", [6, 9, 11, 12])
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 9])
def test_a_state_continues_at_another_depth(depth, steps, through_file, tmp_path):
    """With the newest columns that fit, in both kinds of rows; what follows is that of a history filled that way."""
    parameters = convolution()
    optimizer = adam(parameters)
    go(parameters, optimizer, steps)
    state = copy.deepcopy(optimizer.state_dict())
    if through_file:
        torch.save(state, tmp_path / "state")
        state = torch.load(tmp_path / "state", mmap=True, weights_only=True)
    others = convolution()
    with torch.no_grad():
        for p, q in zip(others, parameters, strict=True):
            p.copy_(q)
    again = adam(others, EAGER | {"history_depth": depth})
    again.load_state_dict(state)
    old, new = aadl.accelerator_of(optimizer).history, aadl.accelerator_of(again).history
    kept = min(depth, len(old.columns))
    assert new.columns == old.columns[-kept:] and kept > 0
    for one, two in zip(old.blocks, new.blocks, strict=True):
        for name, ring in two.tensors.items():
            if name.startswith("delta"):
                assert torch.equal(ring[new.order()], one.tensors[name][old.order()[-kept:]])
            else:
                assert torch.equal(ring, one.tensors[name])
    statistics = aadl.accelerator_of(again).statistics
    assert identical(statistics, aadl.accelerator_of(optimizer).statistics)
    direct = {kind: gram.matrix for kind, gram in old.gram().items()}
    for kind, gram in new.gram().items():
        torch.testing.assert_close(gram.matrix, direct[kind][-kept:, -kept:], rtol=1e-12, atol=0)
    go(others, again, 12)
    assert len(new.columns) == min(depth, len(new.columns) + 12) and statistics["moved"] == 0
    assert all(torch.isfinite(p).all() for p in others)
    resaved = copy.deepcopy(again.state_dict())
    adam(convolution(), EAGER | {"history_depth": depth}).load_state_dict(resaved)


def test_a_state_without_columns_to_keep_continues_too():
    parameters = convolution()
    optimizer = adam(parameters)
    go(parameters, optimizer, 9)
    state = copy.deepcopy(optimizer.state_dict())
    idle = adam(convolution(), EAGER | {"history_depth": 0})
    idle.load_state_dict(state)
    assert aadl.accelerator_of(idle).statistics["steps"] == 9
    assert aadl.accelerator_of(idle).history_bytes == 0
    back = adam(convolution())
    back.load_state_dict(copy.deepcopy(idle.state_dict()))
    assert aadl.accelerator_of(back).history is None and aadl.accelerator_of(back).statistics["steps"] == 9
    early = adam(convolution(), EAGER | {"history_depth": 2})
    early.load_state_dict(copy.deepcopy(adam(convolution()).state_dict()))
    assert aadl.accelerator_of(early).history.columns == []
