"""Lightning's Trainer: automatic and manual optimization, its callbacks, its checkpoints."""

import csv
from pathlib import Path

import pytest
import torch
from problem import FIRST_ATTEMPT, LEARNING_RATE, STEPS_PER_EPOCH, framework, loader, loss_of, network, weights_of
from torch.nn import functional

import aadl

L = framework("lightning.pytorch")
torchmetrics = framework("torchmetrics")
EPOCHS = 12


class Regression(L.LightningModule):
    """The user's module; `accelerated` is the line that is added."""

    def __init__(self, accelerated, make_scheduler=None, settings=None):
        super().__init__()
        self.settings = settings or {}
        self.network, self.accelerated, self.make_scheduler = network(), accelerated, make_scheduler
        self.samples, self.samples_per_epoch = torchmetrics.SumMetric(), []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = functional.mse_loss(self.network(inputs), targets)
        self.samples.update(len(inputs))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", functional.mse_loss(self.network(inputs), targets))

    def on_train_epoch_end(self):
        self.samples_per_epoch.append(int(self.samples.compute()))
        self.samples.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)
        if self.accelerated:
            optimizer = aadl.accelerate(optimizer, **self.settings)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


class Watcher(L.Callback):
    """What a callback sees of every batch and of every optimizer step."""

    def __init__(self):
        self.losses, self.weights, self.rates, self.hooks = [], [], [], []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.hooks.append("zero_grad")

    def on_before_backward(self, trainer, module, loss):
        self.hooks.append("backward")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.hooks.append("step")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.weights.append(weights_of(module.network))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer_of(folder, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return L.Trainer(**quiet | {"max_epochs": EPOCHS} | options)


def fit(module, folder, validation=None, ckpt_path=None, callbacks=(), **options):
    """(trainer, watcher) after a training."""
    watcher = Watcher()
    trainer = trainer_of(folder, callbacks=[watcher, *callbacks], **options)
    trainer.fit(module, loader(), validation, ckpt_path=ckpt_path)
    return trainer, watcher


def statistics_of(trainer, place=0):
    return aadl.accelerator_of(trainer.optimizers[place]).statistics


SCHEDULES = {
    "per epoch": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9),
    "per step": lambda optimizer: {
        "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.9, EPOCHS * STEPS_PER_EPOCH),
        "interval": "step",
    },
    "by a metric": lambda optimizer: {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2),
        "monitor": "train_loss",
    },
}


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, None),
        ({}, "per epoch"),
        ({}, "per step"),
        ({}, "by a metric"),
        ({"accumulate_grad_batches": 2, "max_epochs": 24}, None),
        ({"gradient_clip_val": 20.0}, None),
        ({"precision": "bf16-mixed"}, None),
    ],
    ids=str,
)
def test_automatic_optimization_sees_what_it_sees_without_acceleration(tmp_path, options, schedule):
    def run(accelerated):
        module = Regression(accelerated, SCHEDULES.get(schedule))
        return module, *fit(module, tmp_path, **options)

    plain, plain_trainer, plain_watcher = run(False)
    module, trainer, watcher = run(True)
    assert module.samples_per_epoch == plain.samples_per_epoch == [40] * trainer.max_epochs
    assert watcher.hooks == plain_watcher.hooks
    micro_batches = options.get("accumulate_grad_batches", 1)
    assert watcher.losses[: FIRST_ATTEMPT * micro_batches] == plain_watcher.losses[: FIRST_ATTEMPT * micro_batches]
    assert len(watcher.losses) == len(plain_watcher.losses) == trainer.max_epochs * STEPS_PER_EPOCH
    if schedule != "by a metric":  # which is another one by then
        assert watcher.rates == plain_watcher.rates
    statistics = statistics_of(trainer)
    assert statistics["steps"] == trainer.global_step == plain_trainer.global_step
    assert statistics["accepted"] >= 1 and statistics["closure_evaluations"] == 0
    assert loss_of(module.network) < 0.5 * loss_of(plain.network)


def test_the_loss_of_a_batch_is_that_of_the_weights_before_its_step(tmp_path):
    module = Regression(True)
    trainer, watcher = fit(module, tmp_path)
    before, probe = [weights_of(network()), *watcher.weights], network()
    batches = list(loader())
    for number, (weights, loss) in enumerate(zip(before, watcher.losses, strict=False)):
        torch.nn.utils.vector_to_parameters(weights, probe.parameters())
        inputs, targets = batches[number % STEPS_PER_EPOCH]
        assert float(functional.mse_loss(probe(inputs), targets)) == pytest.approx(loss, rel=1e-6), number
    assert statistics_of(trainer)["accepted"] >= 1


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_training_repeats_the_uninterrupted_one(tmp_path, stop):
    """Epochs 3 and 5 end in the midst of the two macro-steps between attempts."""
    whole = Regression(True)
    whole_trainer, _ = fit(whole, tmp_path)
    first, _ = fit(Regression(True), tmp_path, max_epochs=stop)
    first.save_checkpoint(tmp_path / "stop.ckpt")
    module = Regression(True)
    trainer, _ = fit(module, tmp_path, ckpt_path=tmp_path / "stop.ckpt")
    assert torch.equal(weights_of(module), weights_of(whole))
    statistics = statistics_of(trainer)
    assert statistics == statistics_of(whole_trainer) and statistics["accepted"] >= 1
    assert statistics["steps"] == trainer.global_step


def test_checkpoints_early_stopping_and_logs(tmp_path):
    """All three read what validation measures, which runs in inference mode; the best checkpoint is resumed."""
    callbacks = [
        L.callbacks.EarlyStopping("val_loss", stopping_threshold=1.0, patience=100),
        L.callbacks.LearningRateMonitor(),
        L.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True),
    ]
    schedule = SCHEDULES["per epoch"]
    logger = L.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module = Regression(True, schedule)
    options = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True, "max_epochs": 40}
    trainer, _ = fit(module, tmp_path, loader(), callbacks=callbacks, **options)
    assert trainer.current_epoch < 40 and loss_of(module.network) < 1.0
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == trainer.global_step == statistics_of(trainer)["steps"]
    resumed = Regression(True, schedule)
    path = callbacks[2].best_model_path
    trainer, _ = fit(resumed, tmp_path, ckpt_path=path, max_epochs=torch.load(path, weights_only=False)["epoch"] + 2)
    assert statistics_of(trainer)["steps"] == trainer.global_step


def test_a_checkpoint_of_validation_before_the_first_step(tmp_path):
    """`Trainer.save_checkpoint` in `on_validation_end` runs in inference mode, the sanity check before any step."""

    class Saving(L.Callback):
        def on_validation_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = Regression(True)
    fit(whole, tmp_path, loader(), callbacks=[Saving()])
    plain = Regression(True)
    fit(plain, tmp_path)
    assert torch.equal(weights_of(whole), weights_of(plain))
    for step in (0, 50):
        module = Regression(True)
        trainer, _ = fit(module, tmp_path, loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert torch.equal(weights_of(module), weights_of(whole)), step
        assert statistics_of(trainer)["steps"] == trainer.global_step == EPOCHS * STEPS_PER_EPOCH


def test_averages_of_weights_see_the_weights_that_a_step_leaves(tmp_path):
    """An exponential moving average: swapped in for validation, which is no change of the training."""
    average = L.callbacks.EMAWeightAveraging(decay=0.9)
    module = Regression(True)
    trainer, watcher = fit(module, tmp_path, loader(), callbacks=[average])
    alone = Regression(True)
    _, other = fit(alone, tmp_path)
    assert all(map(torch.equal, watcher.weights, other.weights))
    assert statistics_of(trainer)["accepted"] >= 1
    expected = other.weights[0]
    for weights in other.weights[1:]:
        expected = 0.9 * expected + 0.1 * weights
    torch.testing.assert_close(weights_of(module.network), expected)  # put in place at the end


def test_stochastic_weight_averaging(tmp_path):
    """What stays is the average of the weights at the starts of the last epochs."""
    swa = L.callbacks.StochasticWeightAveraging(swa_lrs=LEARNING_RATE, swa_epoch_start=6, annealing_epochs=1)
    module = Regression(True)
    trainer, watcher = fit(module, tmp_path, callbacks=[swa])
    ends = watcher.weights[STEPS_PER_EPOCH - 1 :: STEPS_PER_EPOCH]
    torch.testing.assert_close(weights_of(module.network), torch.stack(ends[4 : EPOCHS - 1]).mean(0))
    assert statistics_of(trainer)["accepted"] >= 1


class ManualRegression(Regression):
    """`closure`: how step is called; `clip`: the norm of the gradient."""

    def __init__(self, accelerated, closure=None, clip=None, settings=None):
        super().__init__(accelerated, settings=settings)
        self.automatic_optimization = False
        self.closure, self.clip = closure, clip

    def training_step(self, batch, batch_idx):
        optimizer, (inputs, targets) = self.optimizers(), batch
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = functional.mse_loss(self.network(inputs), targets)
            self.samples.update(len(inputs))
            losses.append(loss.detach())
            self.manual_backward(loss)
            if self.clip:
                self.clip_gradients(optimizer, self.clip, "norm")
            return loss if self.closure == "with a loss" else None

        if self.closure is None:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure=closure)
        return {"loss": losses[0]}


@pytest.mark.parametrize("clip", [None, 20.0])
@pytest.mark.parametrize("closure", [None, "without a loss", "with a loss"])
def test_manual_optimization(tmp_path, closure, clip):
    """Lightning hands closures on inside one of its own: none is evaluated again."""

    def run(accelerated):
        module = ManualRegression(accelerated, closure, clip)
        return module, *fit(module, tmp_path)

    plain, _, plain_watcher = run(False)
    module, trainer, watcher = run(True)
    assert module.samples_per_epoch == plain.samples_per_epoch == [40] * EPOCHS
    assert watcher.hooks == plain_watcher.hooks
    assert watcher.losses[:FIRST_ATTEMPT] == plain_watcher.losses[:FIRST_ATTEMPT]
    statistics = statistics_of(trainer)
    assert statistics["steps"] == trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    assert statistics["accepted"] >= 1 and statistics["closure_evaluations"] == 0
    assert loss_of(module.network) < 0.5 * loss_of(plain.network)


def test_who_asks_for_the_loss_gets_it(tmp_path):
    """`safeguard="loss"` evaluates the closure twice for a candidate; metrics inside it count that."""
    module = ManualRegression(True, "with a loss", settings={"safeguard": "loss"})
    trainer, _ = fit(module, tmp_path)
    statistics = statistics_of(trainer)
    assert statistics["steps"] == trainer.global_step and statistics["accepted"] >= 1
    assert sum(module.samples_per_epoch) == 40 * EPOCHS + 4 * statistics["closure_evaluations"]
    assert statistics["closure_evaluations"] >= 2


def test_two_optimizers_that_take_turns(tmp_path):
    """toggle_optimizer freezes the parameters of the other one while one steps; both are accelerated."""

    class Turns(Regression):
        def __init__(self, accelerated):
            super().__init__(accelerated)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                loss = functional.mse_loss(self.network(inputs), targets)
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            return {"loss": loss}

        def configure_optimizers(self):
            made = [torch.optim.SGD([p], lr=LEARNING_RATE) for p in self.network.parameters()]
            return [aadl.accelerate(optimizer) for optimizer in made] if self.accelerated else made

    module, plain = Turns(True), Turns(False)
    trainer, _ = fit(module, tmp_path)
    fit(plain, tmp_path)
    for place in (0, 1):
        statistics = statistics_of(trainer, place)
        assert statistics["steps"] == EPOCHS * STEPS_PER_EPOCH and not statistics["resets"], place
    assert statistics_of(trainer)["accepted"] >= 1
    assert trainer.global_step == 2 * EPOCHS * STEPS_PER_EPOCH


def test_the_search_for_a_learning_rate_leaves_no_trace(tmp_path):
    """`Tuner.lr_find` steps at growing rates, then restores a checkpoint."""

    class Tunable(Regression):
        lr = LEARNING_RATE

    def run(searched):
        module = Tunable(True)
        trainer = trainer_of(tmp_path)
        if searched:
            found = L.tuner.Tuner(trainer).lr_find(module, loader(), num_training=50, update_attr=False)
            assert len(found.results["loss"]) >= 40
        trainer.fit(module, loader())
        return weights_of(module), statistics_of(trainer)

    searched, statistics = run(True)
    alone, expected = run(False)
    assert torch.equal(searched, alone) and statistics == expected
