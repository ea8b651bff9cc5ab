"""HF Trainer: a subclass with one method, its callbacks, logs, schedules and checkpoints."""

import pytest
import torch
from problem import FIRST_ATTEMPT, LEARNING_RATE, STEPS_PER_EPOCH, dataset, framework, loss_of, network, weights_of
from torch import nn

import aadl

transformers = framework("transformers")
framework("accelerate")  # which its Trainer needs
EPOCHS = 12
STEPS = EPOCHS * STEPS_PER_EPOCH


class Regression(nn.Module):
    """A model as Trainer calls it: columns of the data by name, and the loss in a dictionary."""

    def __init__(self):
        super().__init__()
        self.network, self.samples = network(), 0

    def forward(self, inputs, labels):
        predictions = self.network(inputs)
        self.samples += len(inputs) if self.training else 0
        return {"loss": nn.functional.mse_loss(predictions, labels), "logits": predictions}


class AcceleratedTrainer(transformers.Trainer):
    def create_optimizer(self, *args, **kwargs):
        return aadl.accelerate(super().create_optimizer(*args, **kwargs))


class Watcher(transformers.TrainerCallback):
    def __init__(self):
        self.hooks, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.hooks.append("before step")

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.hooks.append("after step")
        self.weights.append(weights_of(model))


def trainer_of(folder, accelerated, callbacks=(), evaluated=False, **options):
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0}
    settings |= {"optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "logging_steps": 1}
    settings |= {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 4, "save_strategy": "no"}
    settings |= {"train_sampling_strategy": "sequential", "max_grad_norm": 20.0, "label_names": ["labels"]}
    data = [{"inputs": inputs, "labels": target} for inputs, target in dataset()]
    kind = AcceleratedTrainer if accelerated else transformers.Trainer
    arguments = transformers.TrainingArguments(**settings | options)
    evaluation = data if evaluated else None
    return kind(Regression(), arguments, train_dataset=data, eval_dataset=evaluation, callbacks=list(callbacks))


def statistics_of(trainer):
    return aadl.accelerator_of(trainer.optimizer).statistics


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 2 * EPOCHS},
        {"bf16": True},
        {"optim": "adamw_torch", "learning_rate": 0.1},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.9}},
    ],
    ids=str,
)
def test_trainer_sees_what_it_sees_without_acceleration(tmp_path, options):
    def run(accelerated):
        watcher = Watcher()
        trainer = trainer_of(tmp_path, accelerated, [watcher], **options)
        trainer.train()
        return trainer, watcher

    plain, plain_watcher = run(False)
    trainer, watcher = run(True)
    assert trainer.model.samples == plain.model.samples
    assert watcher.hooks == plain_watcher.hooks and len(watcher.weights) == STEPS
    for name in ("loss", "grad_norm"):  # of a step are those before it
        assert logged(trainer, name)[:FIRST_ATTEMPT] == logged(plain, name)[:FIRST_ATTEMPT]
        assert len(logged(trainer, name)) == STEPS
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    statistics = statistics_of(trainer)
    assert statistics["steps"] == trainer.state.global_step == STEPS
    assert statistics["attempts"] >= 1 and statistics["closure_evaluations"] == 0
    if "optim" not in options:
        assert statistics["accepted"] >= 1
        assert loss_of(trainer.model.network) < 0.5 * loss_of(plain.model.network)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("stop", [45, 50, 60])
def test_a_resumed_training_repeats_the_uninterrupted_one(tmp_path, optim, stop):
    """Step 45 is in the midst of an epoch and of a macro-step."""
    options = {"optim": optim, "save_strategy": "steps", "save_steps": stop}
    whole = trainer_of(tmp_path, True, **options)
    whole.train()
    resumed = trainer_of(tmp_path, True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert statistics_of(resumed) == statistics_of(whole)
    assert statistics_of(resumed)["steps"] == resumed.state.global_step == STEPS
    assert resumed.model.samples == 4 * (STEPS - stop)
    assert optim != "sgd" or statistics_of(resumed)["accepted"] >= 1


def test_the_best_checkpoint_and_early_stopping(tmp_path):
    """The model that is loaded at the end is the one that was evaluated."""
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    options = each_epoch | {"num_train_epochs": 200, "save_total_limit": 1}
    trainer = trainer_of(tmp_path, True, [stopping], evaluated=True, **options)
    trainer.train()
    assert trainer.state.global_step == statistics_of(trainer)["steps"] < 2000
    best = min(logged(trainer, "eval_loss"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_an_optimizer_that_is_handed_over(tmp_path):
    """`optimizers=(optimizer, None)`: Trainer makes the schedule."""
    model = Regression()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE))
    made = trainer_of(tmp_path, False)
    trainer = transformers.Trainer(model, made.args, train_dataset=made.train_dataset, optimizers=(optimizer, None))
    trainer.train()
    statistics = statistics_of(trainer)
    assert statistics["steps"] == trainer.state.global_step == STEPS and statistics["accepted"] >= 1
    assert aadl.accelerator_of(optimizer).statistics is statistics
