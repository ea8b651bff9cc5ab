"""What a user writes; test_types.py checks it with mypy --strict, and runs it."""

import torch

import aadl

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
optimizer: torch.optim.SGD = aadl.accelerate(
    torch.optim.SGD(model.parameters(), lr=0.1),
    "anderson",
    average="always",
    safeguard="loss",
    state_coupling="combine",
)


def closure() -> torch.Tensor:
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call] # torch gives it no type
    return loss


for _ in range(50):
    optimizer.step(closure)
accelerator = aadl.accelerator_of(optimizer)
accepted: int = accelerator.statistics["accepted"]
rejected: dict[str, int] = accelerator.statistics["rejected"]
statistics: aadl.Statistics = accelerator.statistics
state: dict[str, object] = accelerator.state_dict()
accelerator.load_state_dict(state)
same: torch.optim.SGD = aadl.reset_history(optimizer)
plain: torch.optim.SGD = aadl.remove_acceleration(optimizer)
least_squares: torch.optim.Adam = aadl.accelerate(
    torch.optim.Adam(model.parameters()), "nonlinear_gmres", residuals=lambda: model(inputs) - targets, momentum="keep"
)
