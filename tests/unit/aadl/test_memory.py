"""What a history takes is known before it is there, and one that there is no room for is refused in one sentence."""

import copy
import gc
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from paths import ROOT
from small_runs import identical, network, statistics, train
from torch import nn

import aadl
from aadl import block, memory

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=2),
}
SETTINGS = {
    "defaults": {},
    "lean": {"history_depth": 5, "history_dtype": torch.bfloat16, "state_coupling": "params"},
    "combine": {"state_coupling": "combine"},
    "float64 rows": {"history_dtype": torch.float64},
    "compiled": {"fused": True},
    "idle": {"history_depth": 0},
}


def accelerated(parameters=None, model=None, momentum=0.9, **settings):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.05, momentum=momentum)
    return model, aadl.accelerate(optimizer, **settings)


# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_bytes_are_the_same_before_the_first_step_and_after(make, settings):
    model = network(nn.Linear(6, 6).double(), nn.Linear(6, 6, dtype=torch.complex64))
    model[0].bias.requires_grad_(False)
    optimizer = aadl.accelerate(make(model.parameters()), **settings)
    accelerator = aadl.accelerator_of(optimizer)
    before = accelerator.history_bytes
    assert accelerator.history is None and (before > 0) == (settings != SETTINGS["idle"])
    assert statistics(optimizer)["steps"] == 0

    def squares(model):
        return sum((p * p.conj()).real.sum() for p in model.parameters() if p.requires_grad)

    train(model, optimizer, 10, with_closure=True, loss=squares)
    held = [tensor for block in accelerator.history.blocks for tensor in block.tensors.values()] if before else []
    assert accelerator.history_bytes == before == sum(tensor.nbytes for tensor in held)
    aadl.remove_acceleration(optimizer)
    assert accelerator.history_bytes == 0


@pytest.mark.parametrize(
    ("settings", "bytes_per_parameter"),
    [
        ({}, 2 * 23 * 4),
        ({"state_coupling": "combine"}, 23 * 4 + 12 * 4),
        ({"state_coupling": "params"}, 23 * 4),
        ({"history_dtype": torch.bfloat16, "history_depth": 5, "state_coupling": "combine"}, 32 + 18),
        ({"history_dtype": torch.bfloat16, "history_depth": 5, "state_coupling": "params"}, 32),
    ],
    ids=str,
)
def test_the_prices_that_the_documents_name(settings, bytes_per_parameter):
    _, optimizer = accelerated([nn.Parameter(torch.zeros(100, 10))], **settings)
    assert aadl.accelerator_of(optimizer).history_bytes == 1000 * bytes_per_parameter


def test_bytes_of_a_model_that_no_machine_could_hold():
    _, optimizer = accelerated([nn.Parameter(torch.empty(1).expand(10**9, 10**3))])
    assert aadl.accelerator_of(optimizer).history_bytes == 184 * 10**12


def test_momentum_of_an_optimizer_that_torch_does_not_know_counts_when_it_is_there():
    class Own(torch.optim.SGD):
        pass

    model = network()
    optimizer = aadl.accelerate(Own(model.parameters(), lr=0.05, momentum=0.9), store_each_nth=1)
    accelerator = aadl.accelerator_of(optimizer)
    before = accelerator.history_bytes
    train(model, optimizer, 1)
    assert accelerator.history_bytes == 2 * before


def test_what_waits_on_the_host_of_a_device_counts():
    plain, there = (block.make_block("parameters", [torch.zeros(10)], 3, True, None, planned=True) for _ in range(2))
    there.offloaded = True
    assert there.nbytes == plain.nbytes + 40


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (7,), (2, 3 * memory.MAPPED_FROM)])
def test_rows_are_zeros_of_their_own(shape, dtype):
    first, second = (memory.zeros(shape, dtype, torch.device("cpu")) for _ in range(2))
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous() and not first.any()
    first.fill_(1)
    assert first.numel() == 0 or (first.all() and not second.any())
    assert identical(copy.deepcopy(first), first)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to weigh the process")
def test_rows_take_memory_when_they_are_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    rows = memory.zeros((16, 4 << 20), torch.float32, torch.device("cpu"))
    assert resident() - before < 16 << 20
    rows[:8].fill_(1)
    assert 100 << 20 < resident() - before < 180 << 20
    del rows
    assert resident() - before < 16 << 20


# ---- no room -------------------------------------------------------------------------------------------------------


MADE = weakref.WeakSet()
"""Rows that came from `failing_after` and are still there."""


def failing_after(count, error):
    """In place of `memory.zeros`; fails at the call after so many rows."""
    calls = []

    def zeros(shape, dtype, device, pinned=False):
        row = memory.zeros(shape, dtype, device, pinned)
        if device.type == "meta":
            return row
        calls.append(shape)
        if len(calls) > count:
            raise error
        MADE.add(row)
        return row

    return zeros


SENTENCE = (
    r"^the history of this accelerator, history_depth=10 for 31 elements of parameters and 31 elements of momentum, "
    r"needs 5\.7 kB on cpu, which cannot be allocated \(the host has \d.*B\): use history_depth=5, "
    r"history_dtype=torch\.bfloat16, state_coupling='combine' or shard_history=True \(replicas on several ranks\)$"
)
FAILURES = {
    "no room": lambda patch: patch.setattr(memory, "room_on", lambda device: 5000),
    "the allocator of torch": lambda patch: patch.setattr(
        block, "zeros", failing_after(7, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    ),
    "a device": lambda patch: patch.setattr(block, "zeros", failing_after(7, torch.OutOfMemoryError("CUDA ..."))),
    "Python": lambda patch: patch.setattr(block, "zeros", failing_after(7, MemoryError())),
    "the system": lambda patch: patch.setattr(block, "zeros", failing_after(7, OSError(12, "Cannot allocate memory"))),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_history_without_room_is_refused_before_anything_is_changed(fail):
    """At the first step, before the optimizer made it; the user may detach, or go on once there is room."""
    model, optimizer = accelerated()
    start, errors = copy.deepcopy(model.state_dict()), []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            fail(patch)
            with pytest.raises(torch.OutOfMemoryError, match=SENTENCE) as caught:
                train(model, optimizer, 1)
            errors.append(caught)  # whoever holds the error holds no rows
        gc.collect()
        assert not MADE
    assert identical(model.state_dict(), start) and not optimizer.state
    assert statistics(optimizer)["steps"] == 0 and aadl.accelerator_of(optimizer).history is None

    twin, unbothered = accelerated()
    for m, o in ((model, optimizer), (twin, unbothered)):
        train(m, o, 30)
    assert identical(model.state_dict(), twin.state_dict()) and identical(statistics(optimizer), statistics(unbothered))
    aadl.remove_acceleration(optimizer)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, plain)):
        train(m, o, 5)
    assert identical(model.state_dict(), twin.state_dict())


def test_another_failure_is_not_taken_for_a_lack_of_room(monkeypatch):
    monkeypatch.setattr(block, "zeros", failing_after(7, RuntimeError("an illegal instruction")))
    with pytest.raises(RuntimeError, match=r"^an illegal instruction$"):
        train(*accelerated(), 1)


@pytest.mark.parametrize("room", [100, 15_000])
def test_nonlinear_gmres_names_cures_that_it_takes(monkeypatch, room):
    """For its rows of weights, and for those of residuals."""
    monkeypatch.setattr(memory, "room_on", lambda device: room)
    model = network()
    residuals = torch.ones(1000) if room > 100 else torch.ones(1)
    optimizer = aadl.accelerate(
        OPTIMIZERS["SGD"](model.parameters()), "nonlinear_gmres", residuals=lambda: residuals, frequency=1
    )
    kind = "residuals" if room > 100 else "parameters"
    cure = r"use history_depth=10 or history_dtype=torch\.bfloat16$"
    with pytest.raises(torch.OutOfMemoryError, match=rf"elements of {kind}, .*{cure}"):
        train(model, optimizer, 1)


def test_the_sentence_names_only_what_helps(monkeypatch):
    monkeypatch.setattr(memory, "room_on", lambda device: 10)
    lean = {"history_depth": 1, "history_dtype": torch.bfloat16, "state_coupling": "params", "shard_history": True}
    with pytest.raises(torch.OutOfMemoryError, match=r"for 31 elements .* needs 496 B .*: use a smaller model$"):
        train(*accelerated(**lean), 1)
    settings = aadl.accelerator_of(accelerated()[1]).settings
    cuda = memory.Need({torch.device("cpu"): 9, torch.device("cuda", 0): 184 * 10**9}, {"parameters": 10**9})
    monkeypatch.setattr(memory, "room_on", lambda device: 75_200_000_000)
    expected = "1,000,000,000 elements of parameters, needs 184 GB on cuda:0, which cannot be allocated (free: 75.2 GB)"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        memory.check_room(cuda, settings)
    assert expected in str(caught.value) and str(caught.value).endswith(" or history_device='cpu'")


def test_a_state_of_a_history_without_room_is_refused(monkeypatch):
    model, optimizer = accelerated()
    train(model, optimizer, 25)
    state = copy.deepcopy(optimizer.state_dict())
    _, fresh = accelerated()
    monkeypatch.setattr(memory, "room_on", lambda device: 5000)
    for attempt in (fresh.state_dict, lambda: fresh.load_state_dict(state)):
        with pytest.raises(torch.OutOfMemoryError, match=SENTENCE):
            attempt()
    assert not fresh.state and aadl.accelerator_of(fresh).history is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to set a limit that is just too low")
@pytest.mark.parametrize("depth", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_a_limit_of_the_system_is_met_with_a_sentence(depth):
    """A real one: 10 million elements, 40 MB a vector, in a process that may have 400 MB more than it has."""
    script = f"""
        import resource
        from pathlib import Path

        import torch
        import aadl

        torch.set_num_threads(1)
        x = torch.nn.Parameter(torch.ones(10_000_000))
        x.grad = torch.ones_like(x)
        optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.5), history_depth={depth}, store_each_nth=1, frequency=1)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 400_000_000,) * 2)
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:
            print(error)
            assert bool((x == 1).all())
            aadl.remove_acceleration(optimizer)
            optimizer.step()
        assert bool((x == 0.5).all())
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    printed = "history_depth=20 for 10,000,000 elements of parameters, needs 1.72 GB on cpu, which cannot be allocated"
    assert (printed in result.stdout) == (depth == 20) == bool(result.stdout)


# ---- ranks ---------------------------------------------------------------------------------------------------------


def without_room_on(rank, size, missing):
    """What was raised, the bytes before the first step, and how the training goes on when there is room."""
    outcomes = []
    for shard in (False, True):
        model, optimizer = accelerated(shard_history=shard, store_each_nth=1, frequency=2)
        accelerator, raised = aadl.accelerator_of(optimizer), ""
        before = accelerator.history_bytes
        with pytest.MonkeyPatch.context() as patch:
            if rank in missing:
                patch.setattr(memory, "room_on", lambda device: 100)
            try:
                train(model, optimizer, 1)
            except torch.OutOfMemoryError as error:
                raised = str(error)
                assert accelerator.history is None and not optimizer.state
        train(model, optimizer, 8)
        assert accelerator.history_bytes == before
        outcomes.append((raised, before, model.state_dict(), statistics(optimizer)["steps"]))
    return outcomes


@pytest.mark.parametrize("missing", [(), (1,), (0, 1)])
def test_ranks_refuse_together(missing, spawn_ranks):
    first, second = spawn_ranks(without_room_on, 2, missing)
    for shard, (here, there) in enumerate(zip(first, second, strict=True)):
        assert here[1] == (16 if shard else 31) * 184 and there[1] == (15 if shard else 31) * 184
        assert identical(here[2:], there[2:]) and here[3] == (8 if missing else 9)
        for rank, (raised, *_) in enumerate((here, there)):
            if rank in missing:
                assert f"needs {memory.size(first[shard][1] if rank == 0 else second[shard][1])}" in raised
            else:
                assert raised == (
                    "the history of this accelerator fits on this rank, but not on 1 of the 2 ranks, whose errors say "
                    "what it needs there" if missing else ""
                )  # fmt: skip
