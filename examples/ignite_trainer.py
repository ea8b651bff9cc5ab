"""PyTorch Ignite: the line stands where the optimizer is made; Checkpoint carries the history.

pip install pytorch-ignite && python examples/ignite_trainer.py
"""

import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import aadl

torch.manual_seed(0)
inputs = torch.randn(40, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)

model = nn.Linear(8, 1)
optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02))  # the one line
trainer = create_supervised_trainer(model, optimizer, mse_loss)

state = {"model": model, "optimizer": optimizer, "trainer": trainer}
checkpoint = Checkpoint(state, "checkpoints")
trainer.add_event_handler(Events.EPOCH_COMPLETED(every=5), checkpoint)
trainer.run(loader, max_epochs=10)

Checkpoint.load_objects(state, checkpoint=checkpoint.last_checkpoint)
trainer.run(loader, max_epochs=20)  # goes on where the first run stopped
print(aadl.accelerator_of(optimizer))
assert aadl.accelerator_of(optimizer).statistics["steps"] == trainer.state.iteration
