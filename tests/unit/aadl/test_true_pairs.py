"""True pairs: the mapped iterate is what the optimizer makes of its start, whatever happened in between."""

import copy

import pytest
import torch
from histories import explicit, orthogonal_solution
from quadratics import quadratic, sgd
from small_runs import flat, statistics
from torch import nn

import aadl
from aadl.learning_rates import LearningRates

PURE = {"history_depth": 4, "store_each_nth": 1, "reg_acc": 0, "safeguard": False, "average": False}


class Map:
    """One macro-step of SGD on a mildly nonlinear problem, run beside the library: (x, momentum) -> (x, momentum)."""

    def __init__(self, size=12, store_each_nth=1, momentum=0.0):
        self.problem = quadratic(20.0, seed=1, size=size)
        self.store_each_nth, self.momentum = store_each_nth, momentum

    def loss(self, x):
        distance = x - self.problem.solution
        return 0.5 * distance @ (self.problem.matrix @ distance) + 0.1 * (1 - torch.cos(distance)).sum()

    def gradient(self, x):
        return self.problem.gradient(x) + 0.1 * torch.sin(x - self.problem.solution)

    def __call__(self, x, velocity, lr):
        for _ in range(self.store_each_nth):
            velocity = self.momentum * velocity + self.gradient(x)
            x = x - lr * velocity
        return x, velocity

    def accelerated(self, **acceleration):
        schedule = {"store_each_nth": self.store_each_nth, "frequency": 2 * self.store_each_nth}
        return sgd(self.problem, PURE | schedule | acceleration, lr=0.3, momentum=self.momentum)

    def run(self, x, optimizer, steps):
        for _ in range(steps):
            x.grad = self.gradient(x.detach())
            optimizer.step()


def stored_pairs(optimizer):
    """(x_j, v_j, g_j, w_j, lr factor) newest first, reconstructed from the rows of the history."""
    accelerator = aadl.accelerator_of(optimizer)
    history = accelerator.history
    blocks = {block.kind: block for block in history.blocks}
    own, momentum = blocks["parameters"], blocks.get("momentum")
    columns = [(history.order()[i], history.columns[i].learning_rate) for i in range(len(history.columns))]
    rate = accelerator.pair_learning_rate
    g, f = own.mapped.clone(), own.residual.clone()
    w, e = (momentum.mapped.clone(), momentum.residual.clone()) if momentum else (torch.zeros(()), torch.zeros(()))
    pairs = []
    for slot, column_rate in [*reversed(columns), (None, None)]:
        pairs.append((g - f, w - e, g, w, rate))
        if slot is None:
            return pairs
        x, f = g - f, f * (column_rate / rate)  # the row belongs to the rate of its newer pair
        g, rate = x + f, column_rate
        g, f = g - own.delta_mapped[slot], f - own.delta_residual[slot]
        if momentum:
            w, e = w - momentum.delta_mapped[slot], e - momentum.delta_residual[slot]


def assert_true_pairs(evaluate, optimizer, count=5, lr=0.3):
    pairs = stored_pairs(optimizer)
    assert len(pairs) == count
    for x, v, g, w, rate in pairs:
        expected, velocity = evaluate(x, v, lr * rate)
        assert torch.allclose(g, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(g, evaluate(x + 1e-6, v, lr * rate)[0], rtol=0, atol=1e-9)
        if evaluate.momentum:
            assert torch.allclose(w, velocity, rtol=0, atol=1e-12)


MAPS = [(1, 0.0), (3, 0.0), (1, 0.5), (3, 0.5)]


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
@pytest.mark.parametrize("frequency", [1, 2, 5])
def test_pairs_are_true_after_accepted_candidates(store_each_nth, momentum, frequency):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(frequency=frequency * store_each_nth)
    for _ in range(9):
        evaluate.run(x, optimizer, store_each_nth)
        assert_true_pairs(evaluate, optimizer, min(5, aadl.accelerator_of(optimizer).statistics["macro_steps"]))
    assert aadl.accelerator_of(optimizer).statistics["accepted"] >= 1


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
def test_pairs_are_true_after_candidates_rejected_by_the_loss(store_each_nth, momentum):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(safeguard="loss")
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = evaluate.loss(x)
        loss.backward()
        calls.append(loss)
        return loss.detach() + len(calls)  # every call is worse than the last one: the candidate never wins

    plain, base = sgd(evaluate.problem, lr=0.3, momentum=momentum)
    for _ in range(16 * store_each_nth):
        optimizer.step(closure)
        evaluate.run(plain, base, 1)
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["rejected"].get("loss", 0) >= 2 and statistics["accepted"] == 0
    assert_true_pairs(evaluate, optimizer)
    assert torch.allclose(x, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
def test_pairs_are_true_after_reverted_candidates(store_each_nth, momentum, monkeypatch):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(safeguard="residual", frequency=store_each_nth)
    statistics = aadl.accelerator_of(optimizer).statistics
    evaluate.run(x, optimizer, 4 * store_each_nth)
    statistics["accepted"] = statistics["reverted"] = 0
    monkeypatch.setattr("aadl.acceptance.must_revert", lambda *_: True)
    for number in range(5, 11):
        evaluate.run(x, optimizer, store_each_nth)
        assert_true_pairs(evaluate, optimizer, min(number, 5))  # those of the candidates that were reverted stay
    assert statistics["reverted"] >= 2
    assert_true_pairs(evaluate, optimizer)


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
@pytest.mark.parametrize("steps", [6, 7, 8])
def test_pairs_are_true_after_a_resume(store_each_nth, momentum, steps):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated()
    evaluate.run(x, optimizer, steps)
    y, resumed = evaluate.accelerated()
    with torch.no_grad():
        y.copy_(x)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        evaluate.run(x, optimizer, store_each_nth)
        evaluate.run(y, resumed, store_each_nth)
        assert torch.equal(x, y)
        assert_true_pairs(evaluate, resumed, len(stored_pairs(resumed)))
    evaluate.run(y, resumed, 3 * store_each_nth)
    assert_true_pairs(evaluate, resumed)


@pytest.mark.parametrize("frequency", [1, 2, 100])
def test_pairs_are_true_after_changes_of_the_learning_rate(frequency):
    evaluate = Map()
    x, optimizer = evaluate.accelerated(frequency=frequency)
    rates = [0.3, 0.3, 0.28, 0.28, 0.28, 0.29, 0.3, 0.3, 0.27]
    for number, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        evaluate.run(x, optimizer, 1)
        assert_true_pairs(evaluate, optimizer, min(number, 5))
    assert aadl.accelerator_of(optimizer).statistics["resets"] == {}
    assert len({pair[-1] for pair in stored_pairs(optimizer)}) > 2


def test_mixing_after_a_change_of_the_learning_rate_is_mixing_at_the_new_rate():
    """Linear map, relaxation 1 and 0.5: the iterate equals textbook mixing of all pairs evaluated at the new rate."""
    problem = quadratic(20.0, seed=1, size=12)
    for relaxation in (1.0, 0.5):
        options = {"history_depth": 3, "frequency": 2, "relaxation": relaxation}
        x, optimizer = sgd(problem, PURE | options, lr=0.5)
        starts = []
        for rate in (0.5, 0.5, 0.45, 0.45, 0.5, 0.55):
            optimizer.param_groups[0]["lr"] = rate
            x.grad = problem.gradient(x.detach())
            starts.append(x.detach().clone())
            optimizer.step()
        assert aadl.accelerator_of(optimizer).statistics["accepted"] == 3
        candidates = [
            textbook([(start, start - rate * problem.gradient(start)) for start in starts[-4:]], relaxation)
            for rate in (0.55, 0.5)
        ]
        assert torch.allclose(x, candidates[0], rtol=0, atol=1e-10)
        assert not torch.allclose(x, candidates[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("relaxation", [1.0, 0.5])
@pytest.mark.parametrize(
    "rates", [(0.1, 0.1, 0.3), (0.1, 0.2, 0.3), (0.3, 0.2, 0.3), (0.3, 0.3, 0.1), (0.2, 0.3, 0.25)]
)
def test_a_mean_takes_no_update_longer_than_it_was_made(rates, relaxation):
    """Where the rate has risen, the mapped iterates of the present rate lie where the optimizer has never been."""
    problem = quadratic(20.0, seed=1, size=12)
    options = {"history_depth": 3, "frequency": 3, "average": "always", "average_window": 3, "relaxation": relaxation}
    x, optimizer = sgd(problem, PURE | options, lr=0.5)
    pairs = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        start = x.detach().clone()
        x.grad = problem.gradient(start)
        optimizer.step()
        pairs.append((start, -problem.gradient(start)))
    assert aadl.accelerator_of(optimizer).statistics["accepted"] == 1
    mapped = [start + min(rate, rates[-1]) * down for rate, (start, down) in zip(rates, pairs, strict=True)]
    mean_residual = sum(rates[-1] * down for _, down in pairs) / 3
    expected = sum(mapped) / 3 - (1 - relaxation) * mean_residual
    assert torch.allclose(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("due", [False, True])
def test_the_pair_of_a_reverted_candidate_stays(due, monkeypatch):
    evaluate = Map(momentum=0.5)
    x, optimizer = evaluate.accelerated(safeguard="residual", frequency=1 if due else 4)
    monkeypatch.setattr("aadl.acceptance.must_revert", lambda *_: True)
    accelerator = aadl.accelerator_of(optimizer)
    while not accelerator.statistics["accepted"]:
        evaluate.run(x, optimizer, 1)
    candidate, velocity = x.detach().clone(), optimizer.state[x]["momentum_buffer"].clone()
    evaluate.run(x, optimizer, 1)
    assert accelerator.statistics["reverted"] == 1
    start, momentum, mapped, _, _ = stored_pairs(optimizer)[0]
    assert torch.allclose(start, candidate, rtol=0, atol=1e-14)
    assert torch.allclose(momentum, velocity, rtol=0, atol=1e-14)
    assert torch.allclose(mapped, evaluate(candidate, velocity, 0.3)[0], rtol=0, atol=1e-14)
    assert not torch.allclose(x, candidate) and not torch.allclose(x, mapped)
    assert accelerator.statistics["resets"] == {}
    evaluate.run(x, optimizer, 1)
    columns = accelerator.history.columns
    assert [column.consecutive for column in columns][-2:] == [False, False]  # to the candidate, and back
    assert_true_pairs(evaluate, optimizer, len(stored_pairs(optimizer)))


def textbook(pairs, relaxation):
    f, g, df, dg = explicit(pairs)
    gamma = orthogonal_solution(df, f)
    return g - dg @ gamma - (1 - relaxation) * (f - df @ gamma)


@pytest.mark.parametrize("factor", [1 / 5, 5])
def test_a_large_change_of_the_learning_rate_starts_another_history(factor):
    evaluate = Map()
    x, optimizer = evaluate.accelerated()
    evaluate.run(x, optimizer, 6)
    optimizer.param_groups[0]["lr"] *= factor
    evaluate.run(x, optimizer, 3)
    assert aadl.accelerator_of(optimizer).statistics["resets"] == {"learning_rate": 1}
    assert_true_pairs(evaluate, optimizer, 3, lr=optimizer.param_groups[0]["lr"])


def test_the_rate_of_a_macro_step_is_the_mean_over_its_steps_and_a_jump_begins_with_new_units():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (group,), rates = optimizer.param_groups, LearningRates()
    means, starts_again = [], []
    for macro_step in ((1.0, 1.0, 0.5, 0.5), (1.5, 1.5, 1.5, 1.5), (1e6, 1e6, 1e6, 1e6)):
        for number, group["lr"] in enumerate(macro_step, start=1):
            rates.see(optimizer)
            rates.add_step(optimizer, number)
        starts_again.append(rates.end_macro_step([group], None, 4))
        means += rates.means
        if not starts_again[-1]:
            rates.pair_factor = rates.factor
    assert means == [0.75, 1.5, 1e6] and starts_again == [False, False, True]
    assert rates.factor == rates.pair_factor == 1.0


def test_columns_of_other_learning_rates_leave_the_mixing_problem_and_not_the_history():
    evaluate = Map()
    x, optimizer = evaluate.accelerated()
    accelerator = aadl.accelerator_of(optimizer)
    for _ in range(4):
        evaluate.run(x, optimizer, 2)
        optimizer.param_groups[0]["lr"] /= 3
    assert accelerator.statistics["resets"] == {}
    evaluate.run(x, optimizer, 2)
    assert len(accelerator.history.columns) == 4  # of two rates, which differ by three
    optimizer.param_groups[0]["lr"] /= 3
    evaluate.run(x, optimizer, 2)
    assert accelerator.statistics["attempts"] > 4 and accelerator.statistics["resets"] == {}


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
@pytest.mark.parametrize("kind", ["anderson", "identity"])
def test_pairs_are_true_with_averaging(store_each_nth, momentum, kind):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(average="always", acceleration_type=kind, average_window=3)
    y, unaveraged = evaluate.accelerated()
    for number in range(1, 10):
        evaluate.run(x, optimizer, store_each_nth)
        evaluate.run(y, unaveraged, store_each_nth)
        assert_true_pairs(evaluate, optimizer, min(number, 5))
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["averaging"] and statistics["accepted"] >= 3 and not torch.allclose(x, y, rtol=1e-3)


@pytest.mark.parametrize("at", [45, 50])
def test_no_candidate_leads_back_over_a_far_load(at):
    """The pairs before it stay true, but mixing with them would undo it."""
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    target = inputs.sum(1, keepdim=True).sin()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    weights = {name: 20 * value for name, value in model.state_dict().items()}
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), average=False)
    for step in range(150):
        if step == at:
            before, accepted = flat(model), statistics(optimizer)["accepted"]
            model.load_state_dict(weights)
            way = (flat(model) - before).norm()
        optimizer.zero_grad()
        (model(inputs) - target).square().mean().backward()
        optimizer.step()
        assert step < at or (flat(model) - before).norm() > 0.5 * way
    assert statistics(optimizer)["accepted"] > accepted > 0


def test_a_rate_that_becomes_one_for_each_element_ends_no_step():
    class Elementwise(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)

    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = aadl.accelerate(Elementwise([x], lr=0.1), store_each_nth=1, frequency=2, wait_iterations=0)
    for rate in (0.1, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), 0.1):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(6):
            x.grad = x.detach() - 1
            optimizer.step()
    assert aadl.accelerator_of(optimizer).statistics["steps"] == 18
