"""Quadratic model problems with a prescribed spectrum, and the loop that counts optimizer steps on them."""

import math
from dataclasses import dataclass

import torch

import aadl


@dataclass(frozen=True)
class Quadratic:
    """0.5 (x - x*)' A (x - x*)."""

    matrix: torch.Tensor
    solution: torch.Tensor

    def gradient(self, x):
        return self.matrix @ (x - self.solution)

    def loss(self, x):
        return 0.5 * float((x - self.solution) @ self.gradient(x))


def quadratic(kappa, seed, size=100, dtype=torch.float64):
    """Eigenvalues logspace(1/kappa .. 1), a random orthogonal basis, a standard normal solution."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = (basis * torch.logspace(-math.log10(kappa), 0, size, dtype=torch.float64)) @ basis.T
    solution = torch.randn(size, generator=generator, dtype=torch.float64)
    return Quadratic(((matrix + matrix.T) / 2).to(dtype), solution.to(dtype))


def sgd(problem, acceleration=None, **options):
    """A parameter at zero and SGD on it, accelerated with the arguments `acceleration` unless that is None."""
    x = torch.nn.Parameter(torch.zeros_like(problem.solution))
    optimizer = torch.optim.SGD([x], **options)
    return x, optimizer if acceleration is None else aadl.accelerate(optimizer, **acceleration)


def steps_to_tolerance(problem, acceleration=None, limit=20_000, lr=1.0, momentum=0.0):
    """Optimizer steps until the residual A x - b is 1e-6 of its start (x = 0), or infinity at the limit."""
    x, optimizer = sgd(problem, acceleration, lr=lr, momentum=momentum)
    start = problem.gradient(x.detach()).norm()
    for step in range(limit):
        x.grad = problem.gradient(x.detach())
        if x.grad.norm() <= 1e-6 * start:
            return step
        optimizer.step()
    return math.inf
