"""Derivatives by autograd, one column after the other, and the residual of 2d Burgers as a textbook has it."""

import math

import torch

from experiments.models.mlp import Derivatives


def derivatives(function, points):
    """The five derivatives of a function of (N, D) points, (N, 1) each, with their graph."""
    points = points.detach().requires_grad_()
    value = function(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    space, laplacian = gradient[:, :-1], torch.zeros_like(value)
    for i in range(space.shape[1] if gradient.requires_grad else 0):
        (row,) = torch.autograd.grad(space[:, i].sum(), points, create_graph=True, allow_unused=True)
        laplacian = laplacian + (0 if row is None else row[:, i : i + 1])
    squares = space.square().sum(1, keepdim=True)
    return Derivatives(value, gradient[:, -1:], space.sum(1, keepdim=True), laplacian, squares)


def gradients(model, loss):
    """The gradients of all parameters, zeros where the loss does not depend on one; the graph stays."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def solution(model, points, is_hard):
    """u, (N, 1): the network, or what meets the conditions for every network."""
    x, t = points[:, :1], points[:, 1:]
    return -torch.sin(math.pi * x) + t * (1 - x**2) * model(points) if is_hard else model(points)


def residual_and_slope(model, points, nu, is_hard):
    """u_t + u u_x - nu u_xx and u_x at the interior points, (N, 1) each."""
    u = derivatives(lambda x: solution(model, x, is_hard), points.interior)
    return u.time + u.value * u.gradient_sum - nu * u.laplacian, u.gradient_sum
