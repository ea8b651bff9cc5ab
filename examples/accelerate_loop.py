"""HF Accelerate: the line stands before or after accelerator.prepare.

pip install accelerate && python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import aadl

torch.manual_seed(0)
inputs = torch.randn(40, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)

accelerator = Accelerator(cpu=True)
model = nn.Linear(8, 1)
optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02))  # the one line
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(10):
    for batch, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(batch), targets))
            optimizer.step()
            optimizer.zero_grad()

accelerator.save_state("state")
accelerator.load_state("state")
print(aadl.accelerator_of(optimizer))
assert aadl.accelerator_of(optimizer).statistics["steps"] == 100
