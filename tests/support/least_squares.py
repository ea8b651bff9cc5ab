"""A sum of squares that every optimizer can step: a closure with gradients, residuals and a Jacobian."""

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector


class LeastSquares:
    """The loss |r(w)|^2 of float64 parameters, which `residuals_of` gets as one vector; it counts its gradients."""

    def __init__(self, residuals_of, *starts):
        self.parameters = [nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
        self.residuals_of, self.calls = residuals_of, 0

    def __call__(self):
        self.calls += 1
        for p in self.parameters:
            p.grad = None
        loss = self.residuals_of(parameters_to_vector(self.parameters)).square().sum()
        loss.backward()
        return loss.detach()

    def residuals(self):
        return self.residuals_of(self.vector())

    def linearize(self):
        return self.residuals(), torch.autograd.functional.jacobian(self.residuals_of, self.vector())

    def vector(self):
        return parameters_to_vector(self.parameters).detach().clone()

    def loss(self):
        return float(self.residuals().square().sum())

    def gradient(self):
        self()
        return torch.cat([p.grad.reshape(-1) for p in self.parameters])

    def twin(self):
        """Another one with the same weights."""
        return LeastSquares(self.residuals_of, *(p.tolist() for p in self.parameters))


def rosenbrock(w):
    """Residuals of the Rosenbrock function; the solution is a vector of ones."""
    return torch.cat([10 * (w[1:] - w[:-1] ** 2), 1 - w[:-1]])
