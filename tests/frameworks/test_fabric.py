"""Lightning Fabric: accelerated before or after `fabric.setup`, closures, precision, checkpoints."""

import pytest
import torch
from problem import FIRST_ATTEMPT, LEARNING_RATE, STEPS_PER_EPOCH, framework, loader, loss_of, network, weights_of
from torch.nn import functional

import aadl

Fabric = framework("lightning.fabric").Fabric
EPOCHS = 12
STEPS = EPOCHS * STEPS_PER_EPOCH


class Script:
    """The user's script; `accelerated` is where the line is added, if anywhere."""

    def __init__(self, accelerated, precision="32-true", with_closure=False, momentum=0.0):
        self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        self.fabric.launch()
        self.with_closure, self.losses, self.rates = with_closure, [], []
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=momentum)
        if accelerated == "before setup":
            optimizer = aadl.accelerate(optimizer)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        if accelerated == "after setup":
            self.optimizer = aadl.accelerate(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 6, 0.9)
        self.batches = self.fabric.setup_dataloaders(loader())

    def train(self, epochs):
        for _ in range(epochs):
            for inputs, targets in self.batches:
                self.step(inputs, targets)
            self.scheduler.step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])

    def step(self, inputs, targets):
        def closure():
            self.optimizer.zero_grad()
            loss = functional.mse_loss(self.model(inputs), targets)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=20.0)
            return loss

        if self.with_closure:
            self.losses.append(float(self.optimizer.step(closure)))
        else:
            self.losses.append(float(closure()))
            self.optimizer.step()

    @property
    def state(self):
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    @property
    def statistics(self):
        return aadl.accelerator_of(self.optimizer).statistics


@pytest.mark.parametrize("place", ["before setup", "after setup"])
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_loop(place, with_closure, precision):
    plain = Script(None, precision, with_closure)
    plain.train(EPOCHS)
    script = Script(place, precision, with_closure)
    script.train(EPOCHS)
    assert script.losses[:FIRST_ATTEMPT] == plain.losses[:FIRST_ATTEMPT] and len(script.losses) == STEPS
    assert script.rates == plain.rates
    statistics = script.statistics
    assert statistics["steps"] == STEPS and statistics["accepted"] >= 1
    assert (statistics["closure_evaluations"] > 0) == with_closure  # the user's own closure is judged by its loss
    assert loss_of(script.model) < 0.5 * loss_of(plain.model)


@pytest.mark.parametrize("place", ["before setup", "after setup"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_resumed_training_repeats_the_uninterrupted_one(tmp_path, place, momentum):
    whole = Script(place, momentum=momentum)
    whole.train(EPOCHS)
    first = Script(place, momentum=momentum)
    first.train(5)
    first.fabric.save(tmp_path / "stop.ckpt", first.state)
    resumed = Script(place, momentum=momentum)
    resumed.fabric.load(tmp_path / "stop.ckpt", resumed.state)
    resumed.train(EPOCHS - 5)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.statistics == whole.statistics and whole.statistics["accepted"] >= 1


def test_accumulated_gradients_are_one_step():
    script = Script("before setup")
    for _ in range(2 * EPOCHS):
        for number, (inputs, targets) in enumerate(script.batches):
            last = number % 2 == 1
            with script.fabric.no_backward_sync(script.model, enabled=not last):
                script.fabric.backward(functional.mse_loss(script.model(inputs), targets) / 2)
            if last:
                script.optimizer.step()
                script.optimizer.zero_grad()
    assert script.statistics["steps"] == STEPS and script.statistics["accepted"] >= 1
