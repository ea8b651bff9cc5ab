"""Acceleration is never much worse than the plain training: rounding, kinks, overshoots, and harm in the long run."""

import itertools
import math
import warnings

import pytest
import torch
from small_runs import EAGER, Pairs, closure_of, flat, identical, network, sgd, snapshot, statistics, train
from torch import nn

import aadl
from aadl import acceptance, advice
from aadl.candidate import step_fraction
from aadl.mixing import Gram, host_tensor, mixing_coefficients
from benchmarks import linear_losses

# ---- columns that are rounding ---------------------------------------------------------------------------------------


def test_columns_below_the_bound_are_left_out_and_those_near_it_are_damped():
    gram = Gram(host_tensor([[1.0, 0.0], [0.0, 1e-8]]), host_tensor([0.5, 5e-5]), 1.0)
    plain = mixing_coefficients(gram, 0.0, 0.0)
    assert plain.gamma.tolist() == pytest.approx([0.5, 5e3]) and plain.numerical_rank == 2
    bounded = mixing_coefficients(gram, 0.0, 0.0, host_tensor([0.0, 1.1e-8]))
    assert bounded.gamma.tolist() == pytest.approx([0.5, 0.0]) and bounded.numerical_rank == 1
    damped = mixing_coefficients(gram, 0.0, 0.0, host_tensor([0.0, 0.25e-8]))
    assert damped.gamma.tolist() == pytest.approx([0.5, 4e3])


@pytest.mark.parametrize("case", [
    linear_losses.Case(loss, optimizer, dtype, batch)
    for (loss, dtype), (optimizer, batch) in itertools.product(
        [("l1", torch.float64), ("huber 0.1", torch.float32), ("pinball 0.9", torch.float64), ("hinge", torch.float32)],
        [("sgd", linear_losses.ROWS), ("nesterov", linear_losses.BATCH), ("signsgd", linear_losses.ROWS)],
    )
], ids=lambda case: f"{case.loss}-{case.optimizer}-{case.batch}")  # fmt: skip
def test_linear_models_under_losses_of_constant_slope(case):
    """A part of the table of `python -m benchmarks.linear_losses`."""
    for seed in (0, 1):
        plain, _ = linear_losses.train(case, seed, 500, None)
        accelerated, _ = linear_losses.train(case, seed, 500, {"safeguard": "residual"})
        end, way = linear_losses.ratios(plain, accelerated)
        assert end <= 1.1 and way <= 2


# ---- the step of a candidate -----------------------------------------------------------------------------------------


def test_the_step_of_a_candidate_is_at_most_its_reach_times_the_way_behind_it():
    model = network()
    optimizer = sgd(model, lr=0.02)
    pairs = Pairs(optimizer)
    settings = EAGER | {"history_depth": 4, "safeguard": "residual", "average": False}
    aadl.accelerate(optimizer, **settings)
    accelerator = aadl.accelerator_of(optimizer)
    longest = last = 0.0
    for _ in range(80):
        accepted, reach = statistics(optimizer)["accepted"], accelerator.decisions.reach
        train(model, optimizer, 1)
        if statistics(optimizer)["accepted"] == accepted:
            continue
        x = flat(model)
        window = pairs.pairs[-5:]
        jumps = sum(float((later[0] - earlier[1]).norm()) for earlier, later in itertools.pairwise(window))
        way = sum(float((g - x).norm()) for x, g in window) + max(jumps, last)
        step = float((x - pairs.pairs[-1][1]).norm())
        assert step <= 1.001 * reach * way
        longest, last = max(longest, step / way), step
    assert longest > 0.1


def test_step_fraction_is_exact_for_consecutive_pairs_and_a_bound_with_jumps():
    torch.manual_seed(0)
    f = torch.randn(5, 30, dtype=torch.float64)
    differences = f[1:] - f[:-1]
    gram = Gram(differences @ differences.T, differences @ f[-1], float(f[-1] @ f[-1]))
    gamma, same, smooth = host_tensor([0.5, -2.0, 1.0, 3.0]), [0.0] * 4, [0.0] * 4
    step, way = float((gamma @ f[1:]).norm()), float(f.norm(dim=1).sum())
    assert step_fraction(gram, gamma, same, smooth, 0.0, 0, 0.25) == pytest.approx(0.25 * way / step)
    assert step_fraction(gram, 0.01 * gamma, same, smooth, 0.0, 0, 0.25) == 1.0
    assert step_fraction(gram, gamma, same, smooth, 3.0, 0, 0.25) == pytest.approx(0.25 * (way + 3.0) / step)
    jumps = [0.0, 3.0, 0.0, 0.0]
    expected = 0.25 * (way + 3.0) / (step + 2.0 * 3.0)
    assert step_fraction(gram, gamma, same, jumps, 7.0, 0, 0.25) == pytest.approx(expected)
    more = float((gamma * host_tensor([0.1, 0.0, 0.2, 0.0]) @ f[:-1]).norm())
    expected = 0.25 * way / (step + more)
    assert step_fraction(gram, gamma, [0.1, 0.0, 0.2, 0.0], smooth, 0.0, 0, 0.25) == pytest.approx(expected)


@pytest.mark.parametrize("relaxation", [1.0, 0.9])
@pytest.mark.parametrize("falling", [True, False])
def test_the_step_of_a_candidate_keeps_to_its_reach_while_the_learning_rate_changes(falling, relaxation):
    """By a fifth from one step to the next, so that the earlier ends of columns are other ones at the present rate."""
    model = network()
    optimizer = sgd(model, lr=0.02)
    pairs, rates, bounded = Pairs(optimizer), [], 0
    settings = EAGER | {"history_depth": 3, "safeguard": "residual", "average": False}
    aadl.accelerate(optimizer, **settings, relaxation=relaxation)
    decisions = aadl.accelerator_of(optimizer).decisions
    for number in range(120):
        rates.append(0.02 * 1.2 ** ((-number if falling else number) % 3))
        optimizer.param_groups[0]["lr"] = rates[-1]
        accepted, reach = statistics(optimizer)["accepted"], decisions.reach
        train(model, optimizer, 1)
        if statistics(optimizer)["accepted"] == accepted or len(pairs.pairs) < 5:
            continue
        x = flat(model)
        window = pairs.pairs[-4:]
        updates = [float((g - x).norm()) * rates[-1] / rate for (x, g), rate in zip(window, rates[-4:], strict=True)]
        jumps = sum(float((later[0] - earlier[1]).norm()) for earlier, later in itertools.pairwise(window))
        step = float((x - window[-1][1]).norm())
        way = sum(updates) + max(jumps, math.sqrt(sum(decisions.last_jump.values())))
        assert step <= 1.001 * (reach * way + (1 - relaxation) * max(updates))
        bounded += 1
    assert bounded > 5


class Slope:
    """Steps of one parameter along a slope that turns round where the parameter passes `turn`."""

    def __init__(self, turn, **settings):
        self.x, self.turn = nn.Parameter(torch.zeros(2, dtype=torch.float64)), turn
        self.optimizer = torch.optim.SGD([self.x], lr=0.1)
        aadl.accelerate(self.optimizer, **EAGER | {"safeguard": "residual", "average": False} | settings)
        self.decisions = aadl.accelerator_of(self.optimizer).decisions

    def step(self):
        """The second coordinate makes columns that are no rounding: it shrinks slowly and says nothing of the first."""
        first = -1.0 if self.x[0] < self.turn else 1.0
        self.x.grad = torch.tensor(
            [first, 1e-3 * math.exp(-self.decisions.statistics["steps"] / 50)], dtype=torch.float64
        )
        self.optimizer.step()


def test_a_step_across_a_kink_is_taken_back_and_the_next_ones_are_shorter():
    slope = Slope(turn=3.0)
    reverted = 0
    for _ in range(200):
        reach = slope.decisions.reach
        slope.step()
        if slope.decisions.statistics["reverted"] > reverted:
            reverted = slope.decisions.statistics["reverted"]
            assert slope.decisions.reach < reach
    assert reverted > 0
    assert abs(float(slope.x.detach()[0]) - 3.0) <= 0.5


# ---- harm in the long run --------------------------------------------------------------------------------------------


def test_a_record_of_losses_tells_a_rise_from_noise():
    record = acceptance.LossRecord()
    assert not any(record.note(loss) for loss in (4, 3, 2, 1, 1, 1, 1, 1, 2.5, 0.5, 1.4, 0.9))
    assert [record.note(loss) for loss in (2, 2.2, 2.4, 2.6, 2.8)].index(True) > 1
    negative = acceptance.LossRecord()
    assert not any(negative.note(loss) for loss in (-1.0, -2.0, -3.0, -4.0, -5.0, -5.0, -5.0))
    assert any(negative.note(1.0) for _ in range(8))
    assert not any(acceptance.LossRecord().note(math.nan) for _ in range(9))
    near_zero = acceptance.LossRecord()
    assert not any(near_zero.note(loss) for loss in (1.0,) * 5 + (1e-9,) * 5 + (1e-3,) * 5)


def test_a_mean_of_iterates_is_no_overshoot():
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
    settings = {"store_each_nth": 1, "frequency": 5, "acceleration_type": "identity", "average": "always"}
    aadl.accelerate(optimizer, **settings)
    for _ in range(500):
        rows = inputs[torch.randint(64, (8,))]
        optimizer.zero_grad()
        (model(rows) - rows.sum(1, keepdim=True) - 0.5 * torch.randn(8, 1)).square().mean().backward()
        optimizer.step()
    assert statistics(optimizer)["stops"] == 0 and statistics(optimizer)["accepted"] >= 95


def test_promises_are_brought_to_the_present_learning_rate():
    pending = acceptance.Candidate(4.0, 16.0, 1.0, {}, advance=3.0, rate=2.0)
    halved = pending.at(1.0)
    assert (halved.predicted, halved.before, halved.noise, halved.advance, halved.rate) == (1.0, 4.0, 0.25, 1.5, 1.0)


SLOW = 0.005
"""A rate at which these trainings do not converge: there the direction of candidates hangs on rounding."""


def rising(model, optimizer, rises):
    """A closure whose loss, as trials see it, goes down and from the step `rises` on up; candidates win every trial."""
    calls = itertools.count()

    def closure():
        value = closure_of(model, optimizer)().double()
        steps, number = statistics(optimizer)["steps"], next(calls)
        base = 2 ** (-steps / 40) if steps < rises else 2 ** ((steps - rises) / 10 - rises / 40)
        return 0.0 * value + base - 1e-9 * number

    return closure


def test_the_candidate_whose_trial_stops_acceleration_is_refused():
    model = network()
    optimizer = sgd(model, lr=SLOW)
    aadl.accelerate(optimizer, **EAGER | {"average": False})
    stops = 0
    for _ in range(400):
        before = statistics(optimizer)["accepted"], statistics(optimizer)["attempts"]
        optimizer.step(rising(model, optimizer, 100))
        counts = statistics(optimizer)
        if counts["stops"] > stops:
            stops = counts["stops"]
            assert (counts["accepted"], counts["attempts"]) == (before[0], before[1] + 1)
            assert aadl.accelerator_of(optimizer).decisions.accepted is None
    assert counts["rejected"]["stopped"] == stops > 0


@pytest.mark.parametrize("rises", [100, 10_000])
def test_a_training_that_goes_back_is_left_alone_until_it_is_twice_as_long(rises):
    model = network()
    optimizer = sgd(model, lr=SLOW)
    aadl.accelerate(optimizer, **EAGER | {"average": False})
    accepted, stops = [], []
    for _ in range(400):
        optimizer.step(rising(model, optimizer, rises))
        accepted.append(statistics(optimizer)["accepted"])
        stops.append(statistics(optimizer)["stops"])
    assert accepted[99] > 5
    if rises > 400:
        assert stops[-1] == 0
        return
    stopped = next(step for step in range(400) if stops[step])
    assert rises <= stopped + 1 <= rises + 60
    assert accepted[stopped] == accepted[2 * stopped - 2]


def test_stops_survive_a_checkpoint():
    def run(resumed):
        model = network()
        optimizer = sgd(model, lr=SLOW)
        aadl.accelerate(optimizer, **EAGER | {"average": False})
        for step in range(300):
            optimizer.step(rising(model, optimizer, 100))
            if step == 140 and resumed:
                state = optimizer.state_dict()
                optimizer = aadl.accelerate(sgd(model, lr=SLOW), **EAGER | {"average": False})
                optimizer.load_state_dict(state)
        return snapshot(model, optimizer)["model"], statistics(optimizer)["stops"]

    (weights, stops), (resumed_weights, resumed_stops) = run(False), run(True)
    assert stops == resumed_stops > 0 and identical(weights, resumed_weights)


def test_overshoots_without_end_stop_acceleration():
    optimizer = aadl.accelerate(sgd(network()), **EAGER)
    decisions = aadl.accelerator_of(optimizer).decisions
    decisions.statistics["macro_steps"] = 50
    decisions.trials.record.lowest = 1.0
    for number in range(1, 10):
        decisions.change_reach(math.inf, overshot=True)
        if decisions.statistics["stops"]:
            break
        assert decisions.reach == max(acceptance.SHORTEST_REACH, acceptance.FIRST_REACH / 4**number)
    assert decisions.pause.until == 100 and decisions.reach == acceptance.FIRST_REACH
    assert decisions.trials.record == acceptance.LossRecord()  # one rise stops acceleration once
    decisions.pause.extend(60)
    assert decisions.pause.until == 100


# ---- warnings --------------------------------------------------------------------------------------------------------


def run_idle(steps, gradient, filters="default", **settings):
    """(counters, warnings) of a run whose gradients are gradient(step)."""
    x = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    aadl.accelerate(optimizer, **EAGER | settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filters)
        for step in range(steps):
            x.grad = gradient(step)
            optimizer.step()
    return statistics(optimizer), [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("cause", "gradient"), [
    ("rank", lambda step: torch.ones(100, dtype=torch.float64)),
    ("backward", lambda step: torch.randn(100, dtype=torch.float64)),
])  # fmt: skip
def test_one_warning_says_why_nothing_is_accepted(cause, gradient):
    settings = {"safeguard": "residual", "average": False}
    counts, texts = run_idle(advice.STEPS + 1, gradient, **settings)  # after two steps of waiting; 200 periods
    assert texts == [] and counts["accepted"] == 0
    counts, texts = run_idle(advice.STEPS + 2, gradient, **settings)
    assert len(texts) == 1 and advice.CURES[cause] in texts[0]
    assert max(counts["rejected"], key=counts["rejected"].get) == cause


def test_updates_that_are_lost_in_rounding_are_not_so_where_the_cures_of_the_warning_are_taken():
    """One step changes the weights, of size 1000, by 0.03, and two updates differ by less than their rounding."""

    def run(dtype, **settings):
        x = nn.Parameter(torch.full((100,), 1e3, dtype=dtype))
        slopes, optimizer = torch.linspace(0.1, 1, 100, dtype=dtype), torch.optim.SGD([x], lr=3e-3)
        settings = EAGER | {"safeguard": "residual", "average": False} | settings
        aadl.accelerate(optimizer, **settings)
        for _ in range(advice.STEPS + settings["store_each_nth"] + 2):
            x.grad = slopes * (x.detach() - 990)
            optimizer.step()
        return statistics(optimizer)

    with pytest.warns(UserWarning, match="larger store_each_nth .10 by default. or parameters in float64") as caught:
        short = run(torch.float32)
    assert len(caught) == 1 and short["rejected"] == {"rank": short["attempts"]} and short["attempts"] > 100
    for cured in (run(torch.float64), run(torch.float32, store_each_nth=20, frequency=40)):
        assert cured["accepted"] > 0


def test_the_warning_comes_once_whatever_happens_when_it_is_due():
    """Here the macro-step in which it is due is abandoned, and the training is saved and resumed later."""
    torch.manual_seed(0)
    settings = EAGER | {"safeguard": "residual", "average": False, "store_each_nth": 2, "frequency": 4}
    x = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.1, momentum=0.5), **settings)
    texts = []
    for step in range(1, 621):
        x.grad = torch.randn(100, dtype=torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if step == 402:
                x.data = x.data.clone()  # other memory: noticed at the end of the macro-step
            optimizer.step()
        texts += [str(warning.message) for warning in caught]
        if step == 400:
            assert texts == []
        if step == 440:
            assert len(texts) == 1
        if step == 520:
            state = optimizer.state_dict()
            optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.1, momentum=0.5), **settings)
            optimizer.load_state_dict(state)
    assert len(texts) == 1 and "no candidate in 100 periods" in texts[0]


def test_the_warning_names_learning_rates_that_jump():
    model = network()
    optimizer = sgd(model)
    aadl.accelerate(optimizer, **EAGER)
    with pytest.warns(UserWarning, match="learning rates of the parameter groups change") as caught:
        for step in range(410):
            optimizer.param_groups[0]["lr"] = 0.05 if step % 2 else 0.005
            train(model, optimizer, 1)
    assert len(caught) == 1 and statistics(optimizer)["attempts"] == 0


def test_the_warning_ends_no_step_where_warnings_are_errors_and_stays_out_where_candidates_are_accepted():
    counts, texts = run_idle(410, lambda step: torch.ones(100, dtype=torch.float64), "error", average=False)
    assert counts["steps"] == 410 and texts == []
    model = network()
    optimizer = aadl.accelerate(sgd(model), **EAGER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 410)
    assert statistics(optimizer)["accepted"] > 0 and caught == []
