"""Lightning Fabric: the line stands before or after fabric.setup.

pip install lightning && python examples/fabric_loop.py
"""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import aadl

torch.manual_seed(0)
inputs = torch.randn(40, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)

fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Linear(8, 1)
optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02))  # the one line
model, optimizer = fabric.setup(model, optimizer)

for _ in range(10):
    for batch, targets in loader:
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(batch), targets))
        optimizer.step()

fabric.save("last.ckpt", {"model": model, "optimizer": optimizer})
fabric.load("last.ckpt", {"model": model, "optimizer": optimizer})
print(aadl.accelerator_of(optimizer))
assert aadl.accelerator_of(optimizer).statistics["steps"] == 100
