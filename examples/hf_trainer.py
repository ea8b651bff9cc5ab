"""HF Trainer: one line in create_optimizer; resume_from_checkpoint restores the history.

pip install transformers accelerate && python examples/hf_trainer.py
"""

import torch
import transformers
from torch import nn
from torch.nn.functional import mse_loss

import aadl


class AcceleratedTrainer(transformers.Trainer):
    def create_optimizer(self, *args, **kwargs):
        return aadl.accelerate(super().create_optimizer(*args, **kwargs))  # the one line


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(8, 1)

    def forward(self, inputs, labels):
        return {"loss": mse_loss(self.network(inputs), labels)}


torch.manual_seed(0)
data = [{"inputs": x, "labels": x.sum(0, keepdim=True)} for x in torch.randn(40, 8)]
arguments = transformers.TrainingArguments(
    "trained", num_train_epochs=10, per_device_train_batch_size=4, optim="sgd", learning_rate=0.02,
    save_strategy="steps", save_steps=50, use_cpu=True, report_to="none",
)  # fmt: skip
AcceleratedTrainer(Regression(), arguments, train_dataset=data).train()

resumed = AcceleratedTrainer(Regression(), arguments, train_dataset=data)
resumed.train(resume_from_checkpoint="trained/checkpoint-50")
accelerator = aadl.accelerator_of(resumed.optimizer)
print(accelerator)
assert accelerator.statistics["steps"] == resumed.state.global_step
