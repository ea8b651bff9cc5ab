"""The loss of a physics-informed network: mean r^2 + weight mean (u - value)^2."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.distributed.ranks import Ranks
from experiments.models.mlp import MLP, Derivatives, accumulate_gradient
from experiments.pinn.equation import Equation
from experiments.pinn.residual import Points, derivatives_at, lifted, residual_at, residual_of, rows_of
from experiments.pinn.settings import PinnConfig
from experiments.training.problem import Observer


class Loss:
    """mean r^2 + weight mean (u - value)^2 on the points of all ranks, computed in the ways that optimizers need."""

    def __init__(self, equation: Equation, config: PinnConfig, ranks: Ranks) -> None:
        self._equation, self._config, self._ranks = equation, config, ranks
        self._slopes: Tensor | None = None  # weights of the residuals at the last linearization

    def backward(self, network: nn.Module, points: Points, observe: Observer | None = None) -> Tensor:
        """The loss; its gradient is added to that of the parameters, chunk by chunk.

        The loss needs the residuals, so `observe` receives them at no further cost.
        """
        assert isinstance(network, MLP)
        size, equation = self._ranks.world_size, self._equation
        interior, error = [], None

        def loss_sum(u: Derivatives, rows: slice) -> Tensor:
            residual = self._scaled(residual_of(equation, u, points, rows), rows)
            interior.append(residual.detach())
            return size * residual.square().sum()

        loss = accumulate_gradient(
            network,
            points.interior,
            loss_sum,
            chunk=self._config.chunk_points,
            count=points.num_interior,
            gradient_square=equation.uses_gradient_square,
            compiles=self._config.compile,
        )
        if points.num_conditions > 0:
            weight = size * self._config.condition_weight / points.num_conditions
            error = self._value(network, points) - points.values
            conditions = weight * error.square().sum()
            conditions.backward()
            loss = loss + conditions.detach()
        if observe is not None:
            inside = torch.cat(interior) if interior else points.interior[:, :1]
            observe(self._weighted(inside, None if error is None else error.detach(), points))
        return self._averaged(network, loss)

    def value(self, network: nn.Module, points: Points) -> Tensor:
        """The loss on the points of this rank, differentiable: its mean over ranks is the loss."""
        residual = self._scaled(residual_at(self._equation, network, points, None), slice(None))
        loss = residual.square().sum() / points.num_interior
        if points.num_conditions > 0:
            error = (self._value(network, points) - points.values).square().sum() / points.num_conditions
            loss = loss + self._config.condition_weight * error
        return self._ranks.world_size * loss

    def parts(self, network: nn.Module, points: Points) -> dict[str, float]:
        """The loss and its parts, as series."""
        pde = residual_at(self._equation, network, points, self._config.chunk_points).double().square().sum()
        error = (self._value(network, points) - points.values).double().square().sum()
        sums = torch.stack([pde, error])
        if self._ranks.world_size > 1:
            dist.all_reduce(sums)
        pde_loss = float(sums[0]) / points.num_interior
        if points.num_conditions == 0:
            return {"metrics/train/loss": pde_loss, "metrics/train/pde_loss": pde_loss}
        condition_loss = float(sums[1]) / points.num_conditions
        return {
            "metrics/train/loss": pde_loss + self._config.condition_weight * condition_loss,
            "metrics/train/pde_loss": pde_loss,
            "metrics/train/condition_loss": condition_loss,
        }

    def residuals(self, network: nn.Module, points: Points) -> Tensor:
        """Residuals of this rank (rows,), weighted so that the loss is the sum of the squares of those of all ranks."""
        with torch.no_grad():
            interior = residual_at(self._equation, network, points, self._config.chunk_points)
            interior = self._scaled(interior, slice(None))
            return self._weighted(interior, self._value(network, points) - points.values, points)

    def linearize(self, network: nn.Module, points: Points, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Residuals (rows,), which `observe` receives, and their Jacobian (rows, parameters); for a single process."""
        assert isinstance(network, MLP)
        equation = self._equation
        if self._config.slope_weight:
            self._slopes = self._slope_weights(network, points)

        def residual(u: Derivatives, rows: slice) -> Tensor:
            return self._scaled(residual_of(equation, u, points, rows), rows)

        def error(u: Derivatives, rows: slice) -> Tensor:
            return lifted(u.value, rows_of(points.condition_lift, rows)) - points.values[rows]

        interior, jacobian = network.residual_jacobian(
            points.interior, residual, self._config.chunk_points, gradient_square=equation.uses_gradient_square
        )
        if len(points.conditions) == 0:
            residuals = self._weighted(interior, None, points)
            jacobian /= math.sqrt(len(points.interior))
        else:
            condition, condition_jacobian = network.residual_jacobian(points.conditions, error, values_only=True)
            residuals = self._weighted(interior, condition, points)
            weights = self._weighted(torch.ones_like(interior), torch.ones_like(condition), points)
            jacobian = torch.cat([jacobian, condition_jacobian]).mul_(weights.unsqueeze(1))
        if observe is not None:
            observe(residuals)
        return residuals, jacobian

    def _scaled(self, residual: Tensor, rows: slice) -> Tensor:
        return residual if self._slopes is None else residual * self._slopes[rows]

    def _slope_weights(self, network: MLP, points: Points) -> Tensor:
        """1 / (1 + |sum_i u_{x_i}|), (N, 1)."""
        with torch.no_grad():
            parts = derivatives_at(network, points, self._equation.num_space, self._config.chunk_points, False)
            return torch.cat([1 / (1 + u.gradient_sum.abs()) for _, u in parts])

    def _weighted(self, interior: Tensor, condition: Tensor | None, points: Points) -> Tensor:
        parts = [interior / math.sqrt(points.num_interior)]
        if condition is not None and points.num_conditions > 0:
            parts.append(condition * math.sqrt(self._config.condition_weight / points.num_conditions))
        return torch.cat(parts).squeeze(1)

    def _value(self, network: nn.Module, points: Points) -> Tensor:
        return lifted(network(points.conditions), points.condition_lift)

    def _averaged(self, network: nn.Module, loss: Tensor) -> Tensor:
        """The mean of loss and gradients over ranks, by one all-reduce."""
        if self._ranks.world_size == 1:
            return loss
        parameters = list(network.parameters())
        flat = torch.cat(
            [
                loss.reshape(1),
                *(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters),
            ]
        )
        dist.all_reduce(flat)
        flat /= self._ranks.world_size
        start = 1
        for p in parameters:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        return flat[0]
