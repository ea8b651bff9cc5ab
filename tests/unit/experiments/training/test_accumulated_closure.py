"""Steps over the parts of a batch: gradients, trials, ranks, overflows, and the seconds of an acceleration."""

import copy

import gloo
import pytest
import torch
from small_runs import identical
from torch import nn

import aadl
from experiments.training.clock import HookSeconds
from experiments.training.closure import AccumulatedClosure
from experiments.training.epochs import Epochs
from experiments.training.problem import Problem
from experiments.training.stage import Stage


class Small(Problem):
    """Cross entropy of three classes, without batches of its own."""

    def plan(self):
        return Epochs(lambda *_: [], 1)

    def loss(self, network, batch):
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    def evaluate(self, network):
        return {}


def small_problem(model=None):
    """A classifier of 4 numbers, by default a linear one, and its batch of 12 rows."""
    problem = Small(model or nn.Sequential(nn.Linear(4, 3)), data_source="", data_digest="")
    return problem, (torch.randn(12, 4), torch.randint(0, 3, (12,)))


def closure_of(problem, optimizer, parts=1, scale=False, **options):
    scaler = torch.amp.GradScaler("cpu", enabled=scale, **options)
    return AccumulatedClosure(problem, problem.model, [Stage(optimizer)], parts, scaler)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts, scale):
    problem, batch = small_problem()
    twin = copy.deepcopy(problem.model)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5, momentum=0.9)
    closure = closure_of(problem, optimizer, parts, scale)
    expected = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        closure.batch = batch
        reported = closure.step()
        expected.zero_grad()
        loss = nn.functional.cross_entropy(twin(batch[0]), batch[1])
        loss.backward()
        expected.step()
        assert reported == pytest.approx(float(loss.detach()), rel=1e-5) and not reported.requires_grad
    torch.testing.assert_close(problem.model.state_dict(), twin.state_dict())
    assert closure.num_losses == 3


def test_a_trial_sees_the_loss_at_the_candidate_and_no_gradient():
    problem, batch = small_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    seen = []

    def trials(_, arguments, kwargs):
        with torch.no_grad():
            seen.append(float(arguments[1]()))
            gradients = [p.grad.clone() for p in problem.model.parameters()]
            problem.model[0].bias.add_(1.0)
            seen.append(float(arguments[1]()))
            problem.model[0].weight.zero_()
            seen.append(float(arguments[1]()))
            assert all(torch.equal(p.grad, g) for p, g in zip(problem.model.parameters(), gradients, strict=True))

    closure = closure_of(problem, optimizer, parts=2)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: trials(optimizer, (None, closure), kwargs))
    closure.batch = batch
    before = float(closure.step())
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)  # a bias on all classes changes nothing
    assert seen[0] != before and seen[2] != seen[0] and closure.num_losses == 4


def test_trials_leave_no_trace_in_batchnorm():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    _, batch = small_problem()
    found = []
    for with_trials in (False, True):
        problem = small_problem(copy.deepcopy(model))[0]
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        closure = closure_of(problem, optimizer, parts=2)
        closure.batch, losses = batch, []
        if with_trials:
            optimizer.register_step_post_hook(lambda *_, closure=closure, losses=losses: losses.append(closure()))
        for _ in range(3):
            closure.step()
        assert len(losses) == 3 * with_trials and problem.model.training
        found.append(problem.model.state_dict())
    assert identical(dict(found[0]), dict(found[1]))
    assert int(found[0]["1.num_batches_tracked"]) == 6  # three steps of two parts


def accumulated_on_ranks(rank, world_size, model, batch):
    """Three steps in two parts, each rank with every other row."""
    model = copy.deepcopy(model)  # what comes from the parent is shared with it, and with the other rank
    problem = small_problem(model)[0]
    closure = closure_of(problem, torch.optim.SGD(model.parameters(), lr=0.5), parts=2)
    closure.model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    closure.batch = tuple(tensor[rank::world_size] for tensor in batch)
    for _ in range(3):
        closure.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_ranks_accumulate_the_gradient_of_the_whole_batch(tmp_path):
    problem, batch = small_problem()
    found = gloo.spawn_ranks(tmp_path / "ranks", accumulated_on_ranks, 2, problem.model, batch)
    closure = closure_of(problem, torch.optim.SGD(problem.model.parameters(), lr=0.5), parts=1)
    closure.batch = batch
    for _ in range(3):
        closure.step()
    assert identical(found[0], found[1])
    torch.testing.assert_close(found[0], dict(problem.model.state_dict()))


def test_a_step_that_overflows_is_skipped_and_no_hook_sees_it():
    problem, batch = small_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    aadl.accelerate(optimizer, store_each_nth=1, frequency=2)
    closure = closure_of(problem, optimizer, scale=True, init_scale=1e38, growth_interval=1000)
    closure.batch = (1e3 * batch[0], batch[1])
    weights = copy.deepcopy(problem.model.state_dict())
    closure.step()
    assert closure.num_skipped == 1 and identical(weights, problem.model.state_dict())
    assert aadl.accelerator_of(optimizer).statistics["steps"] == 0
    for _ in range(300):
        closure.step()
        if closure.num_skipped < closure.num_losses:
            break
    assert aadl.accelerator_of(optimizer).statistics["steps"] == 1
    assert not identical(weights, problem.model.state_dict())


def test_the_scale_of_gradients_goes_on_with_a_saved_run():
    problem, batch = small_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    stopped, again = (closure_of(problem, optimizer, scale=True, init_scale=1e38) for _ in range(2))
    stopped.batch = (1e3 * batch[0], batch[1])
    stopped.step()
    again.load_state_dict(stopped.state_dict())
    assert again.scaler.get_scale() == stopped.scaler.get_scale() == pytest.approx(0.5e38) and again.num_skipped == 1


def test_seconds_of_hooks_are_those_in_between(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("experiments.training.clock.time.perf_counter", lambda: clock[0])

    def take(seconds):
        def hook(*_):
            clock[0] += seconds

        return hook

    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_post_hook(take(100))
    seconds = HookSeconds(optimizer)
    optimizer.register_step_pre_hook(take(1))
    optimizer.register_step_post_hook(take(2))
    seconds.enclose()
    optimizer.register_step_post_hook(take(1000))
    optimizer.step()
    assert seconds() == 3
    optimizer.step()
    assert seconds() == 6
