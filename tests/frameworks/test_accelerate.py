"""HF Accelerate: accelerated before or after `prepare`, accumulation, clipping, precision, checkpoints."""

import pytest
import torch
from problem import FIRST_ATTEMPT, LEARNING_RATE, STEPS_PER_EPOCH, framework, loader, loss_of, network, weights_of
from torch.nn import functional

import aadl

accelerate = framework("accelerate")
EPOCHS = 12
STEPS = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(autouse=True)
def forget_the_accelerator():
    """Its settings are shared by all accelerators of a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Script:
    """The user's script; `accelerated` is where the line is added, if anywhere."""

    def __init__(self, accelerated, with_closure=False, momentum=0.0, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.with_closure, self.losses, self.rates = with_closure, [], []
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=momentum)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 60, 0.9)
        if accelerated == "before prepare":
            optimizer = aadl.accelerate(optimizer)
        prepared = self.accelerator.prepare(model, optimizer, loader(), scheduler)
        self.model, self.optimizer, self.batches, self.scheduler = prepared
        if accelerated == "after prepare":
            self.optimizer = aadl.accelerate(self.optimizer)

    def train(self, epochs):
        for _ in range(epochs):
            for inputs, targets in self.batches:
                with self.accelerator.accumulate(self.model):
                    self.step(inputs, targets)
                    self.scheduler.step()
                    self.rates.append(self.optimizer.param_groups[0]["lr"])

    def step(self, inputs, targets):
        def closure():
            self.optimizer.zero_grad()
            loss = functional.mse_loss(self.model(inputs), targets)
            self.accelerator.backward(loss)
            return loss

        if self.with_closure:
            self.optimizer.step(closure)
            return
        loss = functional.mse_loss(self.model(inputs), targets)
        self.losses.append(float(loss))
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), 20.0)
        self.optimizer.step()
        assert not self.optimizer.step_was_skipped
        self.optimizer.zero_grad()

    @property
    def statistics(self):
        return aadl.accelerator_of(self.optimizer).statistics


@pytest.mark.parametrize("place", ["before prepare", "after prepare"])
@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_training_loop(place, options):
    micro_batches = options.get("gradient_accumulation_steps", 1)
    plain = Script(None, **options)
    plain.train(EPOCHS * micro_batches)
    script = Script(place, **options)
    script.train(EPOCHS * micro_batches)
    first = FIRST_ATTEMPT * micro_batches
    assert script.losses[:first] == plain.losses[:first] and len(script.losses) == len(plain.losses)
    assert script.rates == plain.rates and len(set(plain.rates)) > 1
    assert script.statistics["steps"] == STEPS and script.statistics["accepted"] >= 1
    assert loss_of(script.model) < 0.5 * loss_of(plain.model)


@pytest.mark.parametrize("place", ["before prepare", "after prepare"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_resumed_training_repeats_the_uninterrupted_one(tmp_path, place, momentum, safe_serialization):
    whole = Script(place, momentum=momentum)
    whole.train(EPOCHS)
    first = Script(place, momentum=momentum)
    first.train(5)
    first.accelerator.save_state(tmp_path / "stop", safe_serialization=safe_serialization)
    resumed = Script(place, momentum=momentum)
    resumed.accelerator.load_state(tmp_path / "stop")
    resumed.train(EPOCHS - 5)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.statistics == whole.statistics and whole.statistics["accepted"] >= 1


@pytest.mark.parametrize("place", ["before prepare", "after prepare"])
def test_a_closure_of_the_users_own_is_judged_by_its_loss(place):
    script = Script(place, with_closure=True)
    script.train(EPOCHS)
    assert script.statistics["steps"] == STEPS and script.statistics["accepted"] >= 1
    assert script.statistics["closure_evaluations"] >= 2
