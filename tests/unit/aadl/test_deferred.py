"""Numbers that are read later, and verdicts that wait for them."""

import pytest
import torch
from small_runs import network

import aadl
from aadl.deferred import Deferred


@pytest.mark.parametrize(
    "number", [torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64), torch.tensor(0.1, requires_grad=True)]
)
def test_on_a_cpu_the_number_is_there_at_once(number):
    deferred = Deferred(number)
    assert deferred.values() == deferred.values() == [number.item()]
    assert Deferred(torch.tensor([0.5, 2.0])).values() == [0.5, 2.0]


def test_verdicts_are_noted_in_their_order_once_and_before_anybody_reads_the_statistics():
    optimizer = aadl.accelerate(torch.optim.SGD(network().parameters(), lr=0.1))
    accelerator = aadl.accelerator_of(optimizer)
    decisions, noted = accelerator.decisions, []
    for number in (1.0, 2.0):
        decisions.defer(torch.tensor(number), lambda values, number=number: noted.append((number, values)))
    assert noted == []
    assert accelerator.statistics["steps"] == 0
    assert noted == [(1.0, [1.0]), (2.0, [2.0])]
    decisions.settle()
    assert len(noted) == 2 and decisions.deferred == []


@pytest.mark.parametrize("use", ["state_dict", "reset", "remove", "step"])
def test_whoever_needs_the_verdicts_waits_for_them(use):
    optimizer = aadl.accelerate(torch.optim.SGD(network().parameters(), lr=0.1))
    accelerator, noted = aadl.accelerator_of(optimizer), []
    accelerator.decisions.defer(torch.tensor(3.0), noted.append)
    {"step": optimizer.step}.get(use, getattr(accelerator, use, None))()
    assert noted == [[3.0]]
