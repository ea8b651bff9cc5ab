"""Adam with frozen second moments and LARS, each beside its formula."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from experiments.training.optimizers import LARS, FrozenAdam


def random_gradient(parameter):
    return torch.randn_like(parameter) * torch.logspace(-3, 1, parameter.numel(), dtype=parameter.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_it_is_adam_until_it_freezes(dtype, tolerance):
    own, other = (nn.Parameter(torch.linspace(-1, 2, 7, dtype=dtype)) for _ in range(2))
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = [FrozenAdam([own], freeze_after=20, **arguments), torch.optim.Adam([other], **arguments)]
    for step in range(1, 24):
        own.grad = random_gradient(own)
        other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        distance = float((own - other).detach().norm() / other.detach().norm())
        assert distance <= tolerance or step > 20
    assert distance > 100 * tolerance


def test_then_second_moments_stand_still():
    beta1, beta2, rate, eps, freeze_after = 0.8, 0.95, 1e-2, 1e-6, 5
    parameter = nn.Parameter(torch.linspace(-1, 2, 7, dtype=torch.float64))
    optimizer = FrozenAdam([parameter], rate, (beta1, beta2), eps, freeze_after)
    m, v, w = torch.zeros(7).double(), torch.zeros(7).double(), parameter.detach().clone()
    for step in range(1, 13):
        parameter.grad = gradient = random_gradient(parameter)
        optimizer.step()
        m = beta1 * m + (1 - beta1) * gradient
        if step <= freeze_after:
            v = beta2 * v + (1 - beta2) * gradient**2
        scale = (v / (1 - beta2 ** min(step, freeze_after))).sqrt() + eps
        w = w - rate * m / (1 - beta1**step) / scale
        assert torch.allclose(parameter.detach(), w, rtol=1e-12, atol=1e-14)


def test_lars_takes_the_steps_of_its_formula():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in weights]
    optimizer = LARS(model.parameters(), lr=0.7, momentum=0.9, weight_decay=0.01, trust=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
        for weight, buffer, p in zip(weights, buffers, model.parameters(), strict=True):
            ratio = 0.02 * weight.norm() / (p.grad.norm() + 0.01 * weight.norm()) if p.ndim > 1 else 1.0
            buffer.mul_(0.9).add_(ratio * (p.grad + 0.01 * weight))
            weight.sub_(0.7 * buffer)
        optimizer.step()
        found = parameters_to_vector(model.parameters()).detach()
        torch.testing.assert_close(found, parameters_to_vector(weights), rtol=1e-12, atol=1e-14)


def test_lars_steps_a_tensor_of_zeros_with_the_rate_alone():
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=0.5, momentum=0.0).step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -0.5))
