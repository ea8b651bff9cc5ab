"""A least-squares loss: the closure hands its residuals over, and aadl extrapolates by them.

python examples/least_squares.py
"""

import torch

import aadl


def train(accelerated: bool, steps: int = 200) -> float:
    torch.manual_seed(0)
    inputs = torch.randn(320, 7) * torch.logspace(0, -1, 7)  # features of different size
    target = torch.tanh(inputs.sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(7, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if accelerated:
        aadl.accelerate(optimizer, "nonlinear_gmres")  # line one

    def closure():
        optimizer.zero_grad()
        residuals = model(inputs) - target
        if accelerated:
            aadl.accelerator_of(optimizer).observe(residuals)  # line two
        loss = residuals.square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return (model(inputs) - target).square().mean().item()


plain, accelerated = train(False), train(True)
print(f"final loss: Adam {plain:.2e}, with its residuals {accelerated:.2e}")
assert accelerated < plain / 2
