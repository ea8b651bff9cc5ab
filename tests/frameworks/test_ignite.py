"""PyTorch Ignite: supervised trainers, handlers, the search for a learning rate, checkpoints."""

import pytest
import torch
from problem import FIRST_ATTEMPT, LEARNING_RATE, STEPS_PER_EPOCH, framework, loader, loss_of, network, weights_of
from torch.nn import functional

import aadl

framework("ignite")
engine = framework("ignite.engine")
handlers = framework("ignite.handlers")
metrics = framework("ignite.metrics")
EPOCHS = 12
STEPS = EPOCHS * STEPS_PER_EPOCH


class Script:
    """The user's script; `accelerated` is the line that is added."""

    def __init__(self, accelerated, momentum=0.0, **options):
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=momentum)
        if accelerated:
            self.optimizer = aadl.accelerate(self.optimizer)
        self.losses, self.rates, self.means = [], [], []
        self.trainer = engine.create_supervised_trainer(self.model, self.optimizer, functional.mse_loss, **options)
        milestones = [(0, LEARNING_RATE), (STEPS, 0.9 * LEARNING_RATE)]
        self.schedule = handlers.PiecewiseLinear(self.optimizer, "lr", milestones)
        self.trainer.add_event_handler(engine.Events.ITERATION_STARTED, self.schedule)
        metrics.RunningAverage(output_transform=float).attach(self.trainer, "mean loss")

        @self.trainer.on(engine.Events.ITERATION_COMPLETED)
        def note(trainer):
            self.losses.append(trainer.state.output)
            self.means.append(trainer.state.metrics["mean loss"])
            self.rates.append(self.optimizer.param_groups[0]["lr"])

    def run(self, epochs=EPOCHS):
        self.trainer.run(loader(), max_epochs=epochs)
        return self

    @property
    def state(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        return parts | {"schedule": self.schedule}

    @property
    def statistics(self):
        return aadl.accelerator_of(self.optimizer).statistics


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_trainer_sees_what_it_sees_without_acceleration(options):
    micro_batches = options.get("gradient_accumulation_steps", 1)
    plain = Script(False, **options).run(EPOCHS * micro_batches)
    script = Script(True, **options).run(EPOCHS * micro_batches)
    first = FIRST_ATTEMPT * micro_batches
    assert script.losses[:first] == plain.losses[:first] and script.means[:first] == plain.means[:first]
    assert script.trainer.state.iteration == len(script.losses) == STEPS * micro_batches
    assert script.rates == plain.rates
    assert script.statistics["steps"] == STEPS and script.statistics["accepted"] >= 1
    assert loss_of(script.model) < 0.5 * loss_of(plain.model)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_training_repeats_the_uninterrupted_one(tmp_path, momentum, stop):
    whole = Script(True, momentum).run()
    first = Script(True, momentum)
    saver = handlers.DiskSaver(str(tmp_path), create_dir=True)
    checkpoint = handlers.Checkpoint(first.state, saver, n_saved=1)
    first.trainer.add_event_handler(engine.Events.EPOCH_COMPLETED(once=stop), checkpoint)
    first.run()
    resumed = Script(True, momentum)
    handlers.Checkpoint.load_objects(resumed.state, checkpoint=tmp_path / checkpoint.last_checkpoint)
    assert resumed.trainer.state.epoch == stop
    resumed.run()
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.statistics == whole.statistics and whole.statistics["accepted"] >= 1
    assert resumed.losses == whole.losses[stop * STEPS_PER_EPOCH :]


def test_an_average_of_the_weights_sees_what_a_step_leaves():
    script = Script(True)
    average = handlers.EMAHandler(script.model, momentum=0.1)
    average.attach(script.trainer, name="average", event=engine.Events.ITERATION_COMPLETED)
    seen = [weights_of(script.model)]
    script.trainer.add_event_handler(
        engine.Events.ITERATION_COMPLETED, lambda trainer: seen.append(weights_of(script.model))
    )
    script.run()
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.9 * expected + 0.1 * weights
    torch.testing.assert_close(weights_of(average.ema_model), expected)
    assert script.statistics["accepted"] >= 1


def test_the_search_for_a_learning_rate_leaves_no_trace(tmp_path):
    searched, alone = Script(True), Script(True)
    finder = handlers.FastaiLRFinder()
    trainer = engine.create_supervised_trainer(searched.model, searched.optimizer, functional.mse_loss)
    with finder.attach(trainer, {"model": searched.model, "optimizer": searched.optimizer}, num_iter=50) as finding:
        finding.run(loader())
    assert len(finder.get_results()["loss"]) >= 20
    searched.run()
    alone.run()
    assert torch.equal(weights_of(searched.model), weights_of(alone.model))
    assert searched.statistics == alone.statistics


def test_early_stopping_and_evaluation():
    script = Script(True)
    evaluator = engine.create_supervised_evaluator(script.model, {"loss": metrics.Loss(functional.mse_loss)})
    stop = handlers.EarlyStopping(2, lambda evaluator: -evaluator.state.metrics["loss"], script.trainer)
    evaluator.add_event_handler(engine.Events.COMPLETED, stop)
    script.trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda trainer: evaluator.run(loader()))
    script.run(400)
    assert script.trainer.state.epoch < 400
    assert script.statistics["steps"] == script.trainer.state.iteration
    assert evaluator.state.metrics["loss"] == pytest.approx(loss_of(script.model), rel=1e-4, abs=1e-9)
