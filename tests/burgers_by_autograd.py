"""The residual of 2d Burgers by the book, for tests: autograd twice."""

import math

import torch


def residual_and_slope(model, points, nu, is_hard):
    """u_t + u u_x - nu u_xx and u_x at the interior points, (N, 1) each."""
    x = points.interior.clone().requires_grad_()

    def u_of(z):
        value = model(z)
        return -torch.sin(math.pi * z[:, :1]) + z[:, 1:] * (1 - z[:, :1] ** 2) * value if is_hard else value

    u = u_of(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return first[:, 1:] + u * first[:, :1] - nu * second[:, :1], first[:, :1]
