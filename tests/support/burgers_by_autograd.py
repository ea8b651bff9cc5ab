"""The residual of 2d Burgers as a textbook computes it, for tests: autograd twice."""

import math

import torch


def solution(model, points, is_hard):
    """u, (N, 1): the network, or what meets the conditions for every network."""
    x, t = points[:, :1], points[:, 1:]
    return -torch.sin(math.pi * x) + t * (1 - x**2) * model(points) if is_hard else model(points)


def residual_and_slope(model, points, nu, is_hard):
    """u_t + u u_x - nu u_xx and u_x at the interior points, (N, 1) each."""
    x = points.interior.clone().requires_grad_()
    u = solution(model, x, is_hard)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return first[:, 1:] + u * first[:, :1] - nu * second[:, :1], first[:, :1]
