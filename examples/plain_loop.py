"""A plain training loop: one line accelerates the optimizer.

    python examples/plain_loop.py

The same network is trained with and without aadl on the whole data set, and both losses are printed.
"""

import torch
from torch.nn.functional import mse_loss

import aadl


def train(accelerated: bool, steps: int = 200) -> float:
    torch.manual_seed(0)
    inputs = torch.randn(320, 7) * torch.logspace(0, -1, 7)  # features of different size
    target = torch.tanh(inputs.sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(7, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    if accelerated:
        aadl.accelerate(optimizer, store_each_nth=1, frequency=2)  # the one line; whole batches pay every second step

    def closure():
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), target)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # optimizer.step() after loss.backward() works as well
    if accelerated:
        print(aadl.accelerator_of(optimizer))
    return mse_loss(model(inputs), target).item()


plain, accelerated = train(False), train(True)
print(f"final loss: plain SGD {plain:.2e}, with aadl {accelerated:.2e}")
assert accelerated < plain / 2
