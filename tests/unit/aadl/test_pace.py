"""How often nonlinear GMRES accelerates, and when it clears momentum."""

import math

import pytest
import torch
from residual_runs import ADAM, OFTEN, closure_of, loss_of, network, residuals_of, started, train

import aadl
from aadl import pace
from aadl.pace import Pace, clears_momentum


def test_steps_that_undo_what_was_gained_make_accelerations_more_frequent():
    """A large rate with momentum: accelerated ten steps apart, such a training ends above the plain one."""
    periods, ends = {}, {}
    for frequency in (None, 10):
        model, optimizer, accelerator = started(lr=0.4, momentum=0.9, frequency=frequency)
        train(model, optimizer, 200)
        periods[frequency], ends[frequency] = accelerator.statistics["period"], loss_of(model)
    assert periods[None] < periods[10] == 10
    assert ends[None] < 0.5 * ends[10]


def test_jumps_at_new_points_make_accelerations_rare():
    own = Pace(10, adapts=True, due=10)
    for square in (1.0, 4.0, 16.0, 64.0):
        own.note_square(square, normalized=False)
    assert own.period == pace.SHORTEST and own.is_fast
    own.before = math.nan  # new points
    periods = []
    for jump in (1.3, 1.6, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.3, 1.1, 0.9, 0.0):
        own.note_jump(jump)
        own.note_square(1e9, normalized=False)
        periods.append(own.period)
        own.before = math.nan
    assert periods == [2, 10, 20, 40, 80, 160, 160, 160, 160, 80, 40, 40]


def test_accelerations_that_are_rare_come_no_sooner_after_harm():
    own = Pace(10, adapts=True, due=10)
    own.note_jump(2.0)
    for square in (1.0, 4.0, 16.0):
        own.note_square(square, normalized=False)
    assert own.period == 20


def test_only_steps_whose_length_is_free_shorten_the_period():
    for normalized, period in ((True, 10), (False, 5)):
        own = Pace(10, adapts=True, due=10)
        for square in (1.0, 4.0):
            own.note_square(square, normalized)
        assert own.period == period


def test_the_jump_at_a_change_of_points_is_that_of_the_mean_square():
    model, optimizer, accelerator = started(lr=0.01, **OFTEN)
    jumps, seen = [], []
    note = accelerator.pace.note_jump
    accelerator.pace.note_jump = lambda jump: (jumps.append(jump), note(jump))
    for rows in [slice(0, 16)] * 7 + [slice(16, 64)] * 5:
        if len(seen) == 7:
            aadl.reset_history(optimizer)
        seen.append(float(residuals_of(model, rows).detach().square().mean()))
        optimizer.step(closure_of(model, optimizer, rows))
    assert [jump for jump in jumps if jump] == [pytest.approx(seen[7] / seen[6])]


def test_a_larger_sum_over_more_points_is_no_harm():
    rows, own = slice(None, None, 4), {"check": lambda: torch.ones(1)}  # nothing is accepted
    model, optimizer, accelerator = started(lr=1e-4, residuals=lambda: residuals_of(model, rows), **own)
    train(model, optimizer, 15, observe=False)
    aadl.reset_history(optimizer)
    rows, before = slice(None), accelerator.pace.before
    train(model, optimizer, 25, observe=False)
    assert math.isnan(before) and accelerator.pace.before > 3 * pace.HARM
    assert accelerator.pace.period == accelerator.pace.usual


def test_momentum_is_kept_where_steps_are_normalized_and_accelerations_are_rare():
    fast, slow = Pace(10, True, 0, period=2), Pace(10, True, 0)
    model = network()
    adam, muon = ADAM(model.parameters()), torch.optim.Muon([model[0].weight])
    assert clears_momentum("auto", fast, adam) and not clears_momentum("auto", slow, adam)
    assert not clears_momentum("auto", fast, muon)
    assert clears_momentum("zero", slow, muon) and not clears_momentum("keep", fast, adam)
