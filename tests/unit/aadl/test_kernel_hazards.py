"""What may happen to an accelerated run from outside: modes, threads, blow-ups, refused states, failing compilers."""

import copy
import json
import math
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from histories import copy_histories_to_the_host
from small_runs import ALWAYS, missing_for_compilation, statistics
from torch.utils.flop_counter import FlopCounterMode

import aadl
from aadl import compilation, kernels

LONG = 5000  # elements; kernels are compiled from 4096 on


MODES = {
    "counting operations": lambda: FlopCounterMode(display=False),
    "compilation switched off": lambda: torch._dynamo.config.patch(disable=True),
}


@pytest.fixture
def unbroken(monkeypatch):
    """As if nothing had been compiled in this process yet."""
    monkeypatch.setattr(compilation, "failures", [])
    monkeypatch.setattr(compilation, "variants", set())


def quadratic(numel, *, dtype=torch.float32, momentum=0.0, seed=0, **settings):
    """(parameter, optimizer, step) of SGD on a quadratic."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.Parameter(torch.randn(numel, generator=generator, dtype=dtype))
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.1, momentum=momentum), **ALWAYS | settings)
    curvature = torch.linspace(0.1, 2.0, numel, dtype=dtype)

    def step(count=1):
        for _ in range(count):
            x.grad = curvature * x.detach()
            optimizer.step()

    return x, optimizer, step


def tensors_of(optimizer):
    return [dict(block.tensors) for block in aadl.accelerator_of(optimizer).history.blocks]


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("safeguard", [False, "residual"])
def test_where_torch_would_run_compiled_kernels_as_they_are_written(mode, safeguard):
    runs = []
    for fused, context in ((False, nullcontext()), (True, MODES[mode]())):
        x, optimizer, step = quadratic(LONG, fused=fused, safeguard=safeguard)
        with context:
            step(12)
        runs.append((x.detach(), tensors_of(optimizer), statistics(optimizer)))
    (plain, rows, counts), (other, other_rows, other_counts) = runs
    assert torch.allclose(plain, other, rtol=1e-5, atol=1e-5)
    for block, twin in zip(rows, other_rows, strict=True):
        assert block.keys() == twin.keys()
        for name in block:
            assert torch.allclose(block[name], twin[name], rtol=1e-5, atol=1e-5), name
    assert counts["accepted"] == other_counts["accepted"] > 1
    assert not compilation.variants and compilation.failure() == ""
    x, _, step = quadratic(LONG, fused=False, relaxation=0.5)
    step(12)
    assert not torch.allclose(plain, x, rtol=1e-5, atol=1e-5)


def in_threads(function, arguments, *, at_once):
    """function(argument) by argument, each in a thread of its own."""
    results = {}
    threads = [threading.Thread(target=lambda a=a: results.update({a: function(a)})) for a in arguments]
    for thread in threads:
        thread.start()
        thread.join(None if not at_once else 0)
    for thread in threads:
        thread.join()
    return results


def test_a_work_area_belongs_to_a_thread():
    areas = in_threads(lambda _: kernels.work_area(3, 100, torch.device("cpu")), (1, 2), at_once=False)
    assert areas[1].data_ptr() != areas[2].data_ptr()
    mine = kernels.work_area(3, 100, torch.device("cpu"))
    assert mine is kernels.work_area(3, 100, torch.device("cpu"))


@pytest.mark.skipif(bool(missing_for_compilation()), reason=missing_for_compilation())
@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_of_a_blow_up_are_not_read_after_a_reset(fused):
    x, optimizer, step = quadratic(LONG, fused=fused, frequency=4, wait_iterations=8)
    step(3)
    good = x.detach().clone()
    with torch.no_grad():
        x[0] = math.inf
    step(5)
    assert not all(tensor.isfinite().all() for block in tensors_of(optimizer) for tensor in block.values())
    with torch.no_grad():
        x.copy_(good)
    aadl.reset_history(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler
        step(4)
    assert x.isfinite().all() and statistics(optimizer)["attempts"] > 0
    assert aadl.accelerator_of(optimizer).uses_compiled_kernels == fused
    assert bool(compilation.variants) == fused


@pytest.mark.parametrize("average", [False, "always", "auto"])
def test_the_argument_about_averages_overrides_a_checkpoint(average):
    _, saved, step = quadratic(6, average=False if average == "always" else "always")
    step(10)
    state = copy.deepcopy(saved.state_dict())
    assert json.loads(state["aadl"]["values"])["averaging"] == (average != "always")
    _, optimizer, step = quadratic(6, average=average)
    optimizer.load_state_dict(state)
    restored = aadl.accelerator_of(optimizer).decisions
    assert restored.averaging == (average is not False)
    step(4)
    assert average == "auto" or restored.averaging == (average == "always")


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_state_loaded_while_a_store_waits_continues_as_the_saved_run(offloaded, monkeypatch):
    if offloaded:
        copy_histories_to_the_host(monkeypatch)
    x, optimizer, step = quadratic(6, dtype=torch.float64, store_each_nth=3, frequency=12)
    step(10)
    state, there = copy.deepcopy(optimizer.state_dict()), x.detach().clone()
    step(3)
    expected = x.detach().clone()
    assert statistics(optimizer)["accepted"] == 1
    step(2)
    assert aadl.accelerator_of(optimizer).is_copying == offloaded
    with torch.no_grad():
        x.copy_(there)
    optimizer.load_state_dict(state)
    step(3)
    assert torch.equal(x, expected)
    with torch.no_grad():
        x.copy_(there)
    step(3)
    assert not torch.equal(x, expected)


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_weights_of_losses_out_of_range_are_refused(weight):
    accelerator = aadl.accelerator_of(quadratic(6)[1])
    accelerator.loss_weight = 3
    with pytest.raises(ValueError, match=r"loss_weight.*got"):
        accelerator.loss_weight = weight
    assert accelerator.loss_weight == 3.0


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize("num_kernels", [0, 1, 2])
def test_a_compiler_that_fails_ends_no_step_where_warnings_are_errors(num_kernels, monkeypatch):
    """It fails for the first kernel, for the second, and for the last one."""
    kernels_made, num_calls = [], []

    def compiled(function, variant):
        num_calls.append(function)
        if function not in kernels_made:
            if len(kernels_made) == num_kernels:
                raise RuntimeError("no compiler")
            kernels_made.append(function)
        return function

    monkeypatch.setattr(compilation, "compiled", compiled)
    x, optimizer, step = quadratic(LONG, fused=True, history_depth=3, dtype=torch.float64)
    y, other, plain_step = quadratic(LONG, fused=False, history_depth=3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            step()
            plain_step()
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)
    assert compilation.failure() == "RuntimeError: no compiler"
    assert num_calls[-1] not in kernels_made and len(kernels_made) == num_kernels
    for rows, twin in zip(tensors_of(optimizer), tensors_of(other), strict=True):
        assert all(torch.allclose(rows[name], twin[name], rtol=1e-5, atol=1e-5) for name in rows)
    assert statistics(optimizer)["accepted"] == statistics(other)["accepted"] > 1
