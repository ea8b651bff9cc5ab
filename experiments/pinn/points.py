"""Collocation points of a run: drawn from its seed, replaced on the way, divided among the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_loaders.collocation import adaptive_points, uniform_points
from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.pinn.equation import Equation
from experiments.pinn.residual import Points, prepared, residual_at
from experiments.pinn.settings import PinnConfig

ADAPTIVE_SHARE = 0.5
"""Share of the interior points that `adaptive_pool` gives; the others stay spread over the domain."""
TRAINED, POOL, CHOICE, UNSEEN, OTHERS = (0, 1), 2, 3, (4, 5), (6, 7)
"""Streams of random numbers of a draw: interior points and conditions, or what `adaptive_pool` needs."""


class Collocation:
    """The points of a run: every rank draws all of them and keeps each world_size-th.

    Attributes:
        present: points of this rank.
        whole: interior points of all ranks.

    Raises:
        ValueError: soft conditions, and the equation yields no points for them, so that nothing would train them; or
            points and values do not belong together.
    """

    present: Points
    whole: Tensor

    def __init__(self, equation: Equation, config: PinnConfig, seed: int, ranks: Ranks) -> None:
        self._equation, self._config, self._seed, self._ranks = equation, config, seed, ranks
        self._count = 0
        self._others: tuple[tuple[int, int], Points] | None = None
        self._train_on(self._interior(config.num_points, self._seed_of(TRAINED[0])))

    def unseen(self) -> Points:
        """As many points as a draw has, none of which training sees; the same ones at every call."""
        return self._drawn(self._config.num_points, 0, UNSEEN)

    def others(self, count: int) -> Points:
        """`count` interior points beside the present ones, with their own conditions; the same until the next draw."""
        key = self._count, count
        if self._others is None or self._others[0] != key:
            self._others = key, self._drawn(count, self._count, OTHERS)
        return self._others[1]

    def at(self, network: nn.Module, iteration: int) -> Points:
        """The points of this rank at an iteration; others replace them after each `resample_every` iterations."""
        every = self._config.resample_every
        count = 0 if every is None else iteration // every
        if count != self._count:
            self._count = count
            interior = self._interior(self._config.num_points, self._seed_of(TRAINED[0]))
            if self._config.adaptive_pool is not None and count > 0:
                interior = self._adapted(network, interior, self._config.adaptive_pool)
            self._train_on(interior)
        return self.present

    def state_dict(self) -> dict[str, Any]:
        """How often points were drawn, and the interior ones: adapted points depend on the weights of their time."""
        return {"count": self._count, "whole": self.whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> Points:
        self._count = state["count"]
        self._train_on(state["whole"])
        return self.present

    def _train_on(self, interior: Tensor) -> None:
        """Makes these interior points the present ones, with the conditions that belong to them."""
        self.whole, self.present = interior, self._of_this_rank(interior, self._seed_of(TRAINED[1]))

    def _drawn(self, num_interior: int, count: int, streams: tuple[int, int]) -> Points:
        interior, conditions = (self._seed_of(stream, count) for stream in streams)
        return self._of_this_rank(self._interior(num_interior, interior), conditions)

    def _interior(self, count: int, seed: int) -> Tensor:
        equation = self._equation
        return equation.sample(uniform_points(self._config.sampler, count, equation.num_space + 1, seed))

    def _of_this_rank(self, interior: Tensor, seed: int) -> Points:
        """This rank's part of interior points and of conditions that are drawn with a seed."""
        own = slice(self._ranks.rank, None, self._ranks.world_size)
        conditions, values = self._conditions(seed)
        device = device_of(self._ranks)
        points = prepared(self._equation, self._config, device, interior[own], conditions[own], values[own])
        return points._replace(num_interior=len(interior), num_conditions=len(conditions))

    def _conditions(self, seed: int) -> tuple[Tensor, Tensor]:
        """Points of the initial and boundary conditions of all ranks, and the values there."""
        config, equation, columns = self._config, self._equation, self._equation.num_space + 1
        if config.num_conditions == 0:
            return torch.empty(0, columns, dtype=torch.float64), torch.empty(0, 1, dtype=torch.float64)
        conditions, values = equation.conditions(uniform_points(config.sampler, config.num_conditions, columns, seed))
        if conditions.shape != (len(conditions), columns) or values.shape != (len(conditions), 1):
            raise ValueError(
                f"equation {type(equation).__name__}: conditions must return points (n, {columns}) and values (n, 1), "
                f"got {tuple(conditions.shape)} and {tuple(values.shape)}"
            )
        if config.conditions == "soft" and len(conditions) == 0:
            raise ValueError(
                f"equation {type(equation).__name__}: conditions must yield points with soft conditions, got none for "
                f"problem.num_conditions = {config.num_conditions}, so that nothing would train them"
            )
        return conditions, values

    def _adapted(self, network: nn.Module, interior: Tensor, size: int) -> Tensor:
        """Half of the points replaced by points of a fresh pool where the residual is large.

        Rank 0 decides, because on different machines the residuals may differ in their last digits. A residual that is
        not finite leaves the points as they are: the run is about to be recorded as diverged.
        """
        config, equation = self._config, self._equation
        pool = self._interior(size, self._seed_of(POOL))
        empty = pool[:0]
        points = prepared(equation, config, device_of(self._ranks), pool, empty, empty[:, :1])
        with torch.no_grad():
            residual = residual_at(equation, network, points, config.chunk_points).cpu()
        if bool(residual.isfinite().all()):
            num_adapted = round(ADAPTIVE_SHARE * len(interior))
            if num_adapted > 0:
                chosen = adaptive_points(pool, residual, num_adapted, self._seed_of(CHOICE))
                # The rows that stay are spread over the set, whose order may mean something.
                keep = torch.linspace(0, len(interior) - 1, len(interior) - num_adapted).round().long()
                interior = torch.cat([interior[keep], chosen])
        if self._ranks.world_size > 1:
            shared = interior.to(device_of(self._ranks))
            dist.broadcast(shared, src=0)
            interior = shared.cpu()
        return interior

    def _seed_of(self, stream: int, count: int | None = None) -> int:
        """A seed for each stream of each draw, by default the present one."""
        numbers = self._seed, self._count if count is None else count, stream
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])
