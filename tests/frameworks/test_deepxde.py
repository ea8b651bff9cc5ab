"""DeepXDE with its PyTorch backend: a Poisson problem, callbacks, decaying rates, L-BFGS, save and restore."""

import os

import numpy as np
import pytest
import torch
from problem import FIRST_ATTEMPT, framework, weights_of

import aadl

os.environ.setdefault("DDE_BACKEND", "pytorch")  # read when it is imported
dde = framework("deepxde")
STEPS = 200


def problem(num_domain=16):
    """-u'' = pi^2 sin(pi x) on [-1, 1], u = 0 at its ends; the points are the same in every call."""
    interval = dde.geometry.Interval(-1, 1)
    ends = dde.icbc.DirichletBC(interval, lambda x: 0, lambda x, on_boundary: on_boundary)

    def residual(x, y):
        return dde.grad.hessian(y, x) + np.pi**2 * torch.sin(np.pi * x)

    points = {"train_distribution": "uniform", "solution": lambda x: np.sin(np.pi * x), "num_test": 100}
    return dde.data.PDE(interval, residual, ends, num_domain, 2, **points)


class Watcher(dde.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches, self.weights = 0, []

    def on_batch_end(self):
        self.batches += 1
        self.weights.append(weights_of(self.model.net))


def model_of(accelerated, optimizer="adam", settings=None, **options):
    dde.config.set_random_seed(0)
    model = dde.Model(problem(), dde.nn.FNN([1, 20, 1], "tanh", "Glorot normal"))
    model.compile(optimizer, metrics=["l2 relative error"], verbose=0, **options)
    if accelerated:
        aadl.accelerate(model.opt, **settings or {})
    return model


def train(model, iterations=STEPS, **options):
    watcher = Watcher()
    options = {"verbose": 0, "display_every": 50, "callbacks": [watcher]} | options
    history, state = model.train(iterations=iterations, **options)
    return watcher, history, state


def statistics_of(model):
    return aadl.accelerator_of(model.opt).statistics


@pytest.mark.parametrize("options", [{}, {"decay": ("step", 50, 0.9)}, {"decay": ("exponential", 0.9999)}], ids=str)
def test_a_training_sees_what_it_sees_without_acceleration(options):
    plain, model = model_of(False, "sgd", lr=1e-3, **options), model_of(True, "sgd", lr=1e-3, **options)
    plain_watcher, plain_history, _ = train(plain, display_every=1)
    watcher, history, state = train(model, display_every=1)
    assert watcher.batches == plain_watcher.batches == STEPS
    assert history.steps == plain_history.steps
    for name in ("loss_train", "loss_test", "metrics_test"):  # measured after the step: the first candidate is step 20
        ours, theirs = np.array(getattr(history, name)), np.array(getattr(plain_history, name))
        assert np.array_equal(ours[:FIRST_ATTEMPT], theirs[:FIRST_ATTEMPT])
    assert model.opt.param_groups[0]["lr"] == plain.opt.param_groups[0]["lr"]
    statistics = statistics_of(model)
    assert statistics["steps"] == state.iteration == STEPS and statistics["accepted"] >= 1
    assert sum(history.loss_train[-1]) < sum(plain_history.loss_train[-1])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stop", [65, 100])
def test_a_restored_model_repeats_the_uninterrupted_training(tmp_path, optimizer, stop):
    whole = model_of(True, optimizer, lr=1e-3)
    train(whole)
    first = model_of(True, optimizer, lr=1e-3)
    train(first, stop)
    path = first.save(str(tmp_path / "stop"))
    resumed = model_of(True, optimizer, lr=1e-3)
    resumed.restore(path)
    train(resumed, STEPS - stop)
    assert torch.equal(weights_of(resumed.net), weights_of(whole.net))
    assert statistics_of(resumed) == statistics_of(whole)
    assert optimizer == "adam" or statistics_of(whole)["accepted"] >= 1


def test_the_best_weights_of_model_checkpoint_are_those_of_its_loss(tmp_path):
    """`ModelCheckpoint` with `save_better_only` and `model_restore_path`."""
    model = model_of(True, "sgd", lr=1e-3)
    keeper = dde.callbacks.ModelCheckpoint(str(tmp_path / "best"), save_better_only=True, period=1)
    _, history, state = train(model, callbacks=[keeper], display_every=1)
    path = max(tmp_path.glob("best-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    best = model_of(True, "sgd", lr=1e-3)
    best.restore(str(path))
    losses = best._outputs_losses(True, *best.data.train_next_batch()[:2], None)[1]
    assert losses.sum() == pytest.approx(state.best_loss_train, rel=1e-5)
    assert state.best_loss_train == pytest.approx(min(map(sum, history.loss_train)))


def test_points_that_are_drawn_again():
    """`PDEPointResampler` changes the loss; training goes on."""
    model = model_of(True, "sgd", lr=1e-3)
    model.data.train_distribution = "pseudo"
    _, history, _ = train(model, callbacks=[dde.callbacks.PDEPointResampler(period=50)])
    assert statistics_of(model)["steps"] == STEPS
    assert sum(history.loss_train[-1]) < sum(history.loss_train[0])


def test_compiling_again_starts_without_acceleration():
    """`compile` makes a new optimizer: a second stage is accelerated by a line of its own."""
    model = model_of(True, "adam", lr=1e-3)
    train(model, 50)
    model.compile("sgd", lr=1e-3, verbose=0)
    with pytest.raises(ValueError, match="not accelerated"):
        aadl.accelerator_of(model.opt)
    train(model, 50)


def test_lbfgs_ends_after_its_iterations(monkeypatch):
    """DeepXDE reads the number of iterations from the state of the optimizer, and stops by it."""
    for name, value in {"maxiter": 60, "iter_per_step": 3, "fun_per_step": 4}.items():
        monkeypatch.setitem(dde.optimizers.config.LBFGS_options, name, value)
    everything = {"store_each_nth": 1, "frequency": 2, "history_depth": 5, "safeguard": False}
    model = model_of(True, "L-BFGS", everything)
    watcher = Watcher()

    class Limit(dde.callbacks.Callback):
        def on_batch_end(self):
            assert watcher.batches < 60, "the loop does not end"

    _, history, state = train(model, None, callbacks=[watcher, Limit()])
    assert history.steps == sorted(history.steps) and 60 <= state.iteration < 65
    assert statistics_of(model)["accepted"] >= 5
