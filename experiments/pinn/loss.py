"""The loss of a physics-informed network: mean r^2 + weight mean (u - value)^2."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.distributed.ranks import Ranks
from experiments.models.mlp import MLP, Derivatives
from experiments.pinn.equation import Equation
from experiments.pinn.residual import Points, derivatives_at, lifted, residual_at, residual_of
from experiments.pinn.settings import PinnConfig
from experiments.training.problem import Observer


class Loss:
    """mean r^2 + weight mean (u - value)^2 on the points of all ranks, computed in the ways that optimizers need."""

    def __init__(self, equation: Equation, config: PinnConfig, ranks: Ranks) -> None:
        self._equation, self._config, self._ranks = equation, config, ranks
        self._slopes: Tensor | None = None
        """Weights of the residuals, 1 / (1 + |sum_i u_{x_i}|) at the last linearization; None without them."""

    def backward(self, network: nn.Module, points: Points, observe: Observer | None = None) -> Tensor:
        """The loss; its gradient is added to that of the parameters, chunk by chunk. `observe` gets the residuals."""
        assert isinstance(network, MLP)
        config, equation, size = self._config, self._equation, self._ranks.world_size
        loss, interior = points.interior.new_zeros(()), [points.interior[:0, :1]]
        for rows, u in network.chunked_derivatives(
            points.interior,
            config.chunk_points,
            gradient_square=equation.uses_gradient_square,
            compiles=config.compile,
        ):
            residual = self._scaled(residual_of(equation, u, points, rows), rows)
            interior.append(residual.detach())
            part = size * residual.square().sum() / points.num_interior
            part.backward()
            loss += part.detach()
        error = self._error(network, points)
        if points.num_conditions > 0:
            conditions = size * config.condition_weight / points.num_conditions * error.square().sum()
            conditions.backward()
            loss = loss + conditions.detach()
        if observe is not None:
            observe(self._weighted(torch.cat(interior), error.detach(), points))
        return self._averaged(network, loss)

    def value(self, network: nn.Module, points: Points) -> Tensor:
        """The loss on the points of this rank, differentiable: its mean over ranks is the loss."""
        return self._ranks.world_size * self.residuals(network, points).square().sum()

    def parts(self, network: nn.Module, points: Points) -> dict[str, float]:
        pde = residual_at(self._equation, network, points, self._config.chunk_points).double().square().sum()
        error = self._error(network, points).double().square().sum()
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
        """Residuals of this rank (rows,), differentiable; the sum of the squares of those of all ranks is the loss."""
        interior = self._scaled(residual_at(self._equation, network, points, self._config.chunk_points), slice(None))
        return self._weighted(interior, self._error(network, points), points)

    def linearize(self, network: nn.Module, points: Points, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Residuals (rows,), which `observe` receives, and their Jacobian (rows, parameters); for a single process."""
        assert isinstance(network, MLP)
        equation, chunk = self._equation, self._config.chunk_points
        if self._config.slope_weight:
            with torch.no_grad():
                parts = derivatives_at(network, points, chunk, False)
                self._slopes = torch.cat([1 / (1 + u.gradient_sum.abs()) for _, u in parts])

        def residual(u: Derivatives, rows: slice) -> Tensor:
            return self._scaled(residual_of(equation, u, points, rows), rows)

        interior, jacobian = network.residual_jacobian(
            points.interior, residual, chunk, gradient_square=equation.uses_gradient_square
        )
        if points.num_conditions == 0:
            residuals = self._weighted(interior, points.values, points)
            jacobian /= math.sqrt(len(points.interior))
        else:
            lift = points.condition_lift
            factor = torch.ones_like(points.values) if lift is None else lift[1].value
            values, condition_jacobian = network.value_jacobian(points.conditions, factor)
            residuals = self._weighted(interior, lifted(values, lift) - points.values, points)
            weights = self._weighted(torch.ones_like(interior), torch.ones_like(values), points)
            jacobian = torch.cat([jacobian, condition_jacobian]).mul_(weights.unsqueeze(1))
        if observe is not None:
            observe(residuals)
        return residuals, jacobian

    def _scaled(self, residual: Tensor, rows: slice) -> Tensor:
        return residual if self._slopes is None else residual * self._slopes[rows]

    def _weighted(self, interior: Tensor, condition: Tensor, points: Points) -> Tensor:
        parts = [interior / math.sqrt(points.num_interior)]
        if points.num_conditions > 0:
            parts.append(condition * math.sqrt(self._config.condition_weight / points.num_conditions))
        return torch.cat(parts).squeeze(1)

    def _error(self, network: nn.Module, points: Points) -> Tensor:
        return lifted(network(points.conditions), points.condition_lift) - points.values

    def _averaged(self, network: nn.Module, loss: Tensor) -> Tensor:
        """The mean of loss and gradients over ranks, by one all-reduce."""
        if self._ranks.world_size == 1:
            return loss
        parameters = list(network.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        mean, *parts = (flat / self._ranks.world_size).split([1, *(p.numel() for p in parameters)])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)
        return mean.squeeze()
