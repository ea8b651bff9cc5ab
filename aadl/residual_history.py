"""History of pairs (x_j, r_j): weights, and the residuals of a least-squares loss at them, in difference form.

Ring rows DX and DR hold the differences of neighbors, x_{j+1} - x_j and r_{j+1} - r_j, beside the newest pair. Storing
a pair writes one row of each. The weights enter one linear combination and no product, the residuals the products.

On several ranks each has its own rows of residuals (those of its points), and its part of the weights: all of them, or
the local shards of DTensors. Products are sums over the ranks. A pair has the same slot on every rank; where a rank has
lost a pair (a state of another rank was loaded), no rank uses its slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadl import kernels
from aadl.block import Block, Tensors, allocate, make_block, push_block
from aadl.deferred import handed
from aadl.mixing import Gram, host_tensor
from aadl.parameters import grouped
from aadl.ranks import Ranks, local
from aadl.settings import Settings
from aadl.state import check_rows, load_rows

_kind_of = attrgetter("shape", "dtype", "device")


class Products(NamedTuple):
    """Products of the columns, which the ranks know together when an acceleration is due."""

    gram: Gram
    """DR' DR, DR' r_k and ||r_k||^2, over the columns that every rank has, oldest first."""
    slots: list[int]
    """Their slots, oldest first."""
    doubt: float
    """Sum over the ranks of `ResidualHistory.doubt`."""
    compared: bool
    """Whether every rank has seen residuals twice at the same weights."""
    jump: float
    """Mean square on new points over that on the old ones, where the points have changed since, else 0."""
    num_residuals: int
    """Over all ranks."""
    aligned: bool = True
    """Whether a pair has the same slot on all ranks."""


class ResidualHistory:
    """Pairs of one optimizer.

    Args:
        parameters: those that are extrapolated.
        settings: history_depth, history_dtype, fused.
        ranks: those whose residuals make the loss together.

    Raises:
        torch.OutOfMemoryError: there is no room for the rows.
    """

    def __init__(self, parameters: list[Tensor], settings: Settings, ranks: Ranks) -> None:
        self.parameters, self.ranks, self.depth = parameters, ranks, settings.history_depth
        self._groups, self._settings = grouped(parameters), settings
        self.begin = f"{ranks.index}." if ranks.index else ""
        """Begin of the names of rows here: torch.distributed.checkpoint keeps one of the tensors of one name."""
        self._kinds, self.locals = list(map(_kind_of, parameters)), [local(p) for p in parameters]
        self.watched = [*parameters, *(own for p, own in zip(parameters, self.locals, strict=True) if own is not p)]
        """The parameters, and their shards here, whose version counters show changes."""
        self.tensors: list[Tensors] = [[local(p) for _, p in group] for group in self._groups]
        self.blocks = self._allocated("parameters", self.tensors)
        self.residuals: Block | None = None
        self.doubt: Tensor | None = None
        """||r - r'||^2 / ||r'||^2, where a step has seen residuals r at weights at which r' were stored before."""
        self._old: Tensor | None = None
        self._new: Tensor | None = None
        """Mean squares of the residuals before and after the last change of points."""
        self.pushed = 0
        """Pairs stored in all; pair n has the slot n modulo depth."""
        self.has_pair = False
        self.valid = [False] * self.depth
        self._stale: list[int] = []
        self._matrix = torch.zeros(self.depth, self.depth, dtype=torch.float64)

    def is_of(self, parameters: list[Tensor]) -> bool:
        """Whether these are the parameters, with the shapes, types, devices and shards that they had."""
        same = len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))
        whole = len(self.watched) == len(self.parameters)
        same = same and (whole or all(map(is_, map(local, parameters), self.locals)))
        return same and list(map(_kind_of, parameters)) == self._kinds

    @property
    def nbytes(self) -> int:
        """Bytes of the rows on this rank."""
        return sum(block.nbytes for block in [*self.blocks, *self._residual_blocks])

    @property
    def num_columns(self) -> int:
        """Columns that can be used here."""
        return sum(self.valid)

    # ---- storing ---------------------------------------------------------------------------------------------------

    def push_weights(self) -> None:
        """Store the present weights as those of the next pair; `push_residuals` has to follow."""
        slot = self.pushed % self.depth if self.has_pair else None
        for block, values in zip(self.blocks, self.tensors, strict=True):
            push_block(block, values, slot)

    def push_residuals(self, residuals: Tensor) -> None:
        """Store the residuals of the pair whose weights `push_weights` has stored; shape (M,).

        The history starts with this pair where M or the kind of the numbers is another one than before.
        """
        block = self.residuals
        kind = residuals.numel(), residuals.dtype, residuals.device
        if block is None or (block.row.numel, block.row.dtype, block.row.device) != kind:
            self._forget_points()
            block = self._make_room(residuals)
        slot = self.pushed % self.depth
        if residuals.numel() > kernels.HOST_PIECE:
            push_block(block, [residuals], slot if self.has_pair else None)
        else:
            if self.has_pair:
                torch.sub(residuals, block.mapped, out=block.delta_mapped[slot])
            block.mapped.copy_(residuals)
        if self.has_pair:
            self._stale = [*(s for s in self._stale if s != slot), slot]
        elif self._old is not None:
            self._new = _mean_square(residuals)
        self.valid[slot] = self.has_pair
        self.pushed, self.has_pair = self.pushed + 1, True

    def drop_newest_column(self) -> None:
        """Forget the newest column, which is zero: its two pairs are one."""
        self.pushed -= 1
        self.valid[self.pushed % self.depth] = False

    def forget_columns(self) -> None:
        """Forget all pairs but the newest: those before belong to other points."""
        self.valid = [False] * self.depth

    def void(self, wipe: bool = False) -> None:
        """Forget all pairs; with `wipe` the rows too (they hold inf or nan)."""
        self.valid, self.has_pair, self.doubt = [False] * self.depth, False, None
        for block in [*self.blocks, *self._residual_blocks]:
            if wipe or block.fused:  # compiled kernels read unused rows too
                block.delta_mapped.zero_()
        if wipe:
            self._matrix.zero_()
            self._stale = []

    def align(self) -> None:
        """Start again with slot 0, because the pairs of the ranks have different slots."""
        self.void()
        self.pushed = 0

    def change_points(self) -> None:
        """Forget all pairs, and compare the next residuals with the newest ones: they are those of other points."""
        if self.has_pair and self.residuals is not None:
            self._old, self._new = _mean_square(self.residuals.mapped), None
        self.void()

    def compare(self, residuals: Tensor) -> None:
        """Note the difference of residuals from the newest ones, which were seen at the same weights."""
        block = self.residuals
        if not self.has_pair or block is None or block.row.numel != residuals.numel():
            self._forget_points()
            return
        difference, newest = (residuals - block.mapped).double(), block.mapped.double()
        square = torch.dot(newest, newest).clamp(min=torch.finfo(torch.float64).tiny)
        doubt = torch.dot(difference, difference) / square
        self.doubt = doubt if self.doubt is None else self.doubt + doubt

    def _forget_points(self) -> None:
        """Forget all pairs, because other residuals came; if there were pairs they are in doubt."""
        endless = torch.full((), math.inf, dtype=torch.float64, device=self._matrix.device)
        doubt = endless if self.has_pair else self.doubt
        self.void()
        self.doubt = doubt

    def is_at_newest(self) -> bool:
        """Whether the weights are those of the newest pair, compared one by one."""
        return all(
            all(torch.equal(block.mapped[part], value) for part, value in block.read(values))
            for block, values in zip(self.blocks, self.tensors, strict=True)
        )

    # ---- products --------------------------------------------------------------------------------------------------

    def products(self) -> Products:
        """Products of the columns, summed over the ranks; the host waits for the device.

        Columns stored since the last call are multiplied with all others, in one pass. Of several ranks each adds
        depth (depth + 5) / 2 + 8 numbers to one sum.
        """
        block, depth = self.residuals, self.depth
        assert block is not None
        filled = min(self.pushed, depth)
        with torch.no_grad():
            made = kernels.inner_products(block.delta_mapped, block.mapped, filled, self._stale, block.fused)
        fresh, last = made[:-1, :filled], made[-1]
        if self._stale:
            self._matrix[self._stale, :filled] = fresh
            self._matrix[:filled, self._stale] = fresh.T
            self._stale = []
        device = self._matrix.device
        if self.ranks.size == 1 and device.type == "cpu":
            return self._look_here(last)
        compared = self.doubt is not None
        doubt = torch.zeros((), dtype=torch.float64, device=device) if self.doubt is None else self.doubt.to(device)
        pushed = float(self.pushed % 1024)
        known = host_tensor([*map(float, self.valid), float(compared), pushed, pushed**2, float(block.row.numel)])
        known[:-1] /= self.ranks.size
        upper = _upper(depth, device)
        projection = last.new_zeros(depth)
        projection[:filled] = last[:filled]
        old, new = (doubt.new_zeros(()) if number is None else number for number in self._changes())
        square = torch.stack([last[-1], doubt, old, new])
        message = torch.cat([self._matrix.take(upper), projection, square, handed(known, device)])
        values = self.ranks.total(message).cpu()
        self.doubt = None
        return self._read(values)

    def _look_here(self, last: Tensor) -> Products:
        """The products of a process on its own, everything on the host."""
        assert self.residuals is not None
        slots, doubt, self.doubt = self._slots(self.valid), self.doubt, None
        gram = Gram(self._matrix[slots][:, slots], last[slots], float(last[-1]))
        old, new = (0.0 if number is None else float(number) for number in self._changes())
        doubtful = 0.0 if doubt is None else float(doubt)
        jump = new / old if old > 0 else 0.0
        return Products(gram, slots, doubtful, doubt is not None, jump, self.residuals.row.numel)

    def _changes(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean squares before and after the last change of points, once the next pair is stored; each change once."""
        if self._new is None:
            return None, None
        changes, self._old, self._new = (self._old, self._new), None, None
        return changes

    def _slots(self, valid: Sequence[bool]) -> list[int]:
        """Usable slots, oldest column first."""
        newest = [(self.pushed - 1 - age) % self.depth for age in range(self.depth)]
        return [slot for slot in reversed(newest) if valid[slot]]

    def _read(self, message: Tensor) -> Products:
        """The products, from the sum over the ranks."""
        depth = self.depth
        count = depth * (depth + 1) // 2
        numbers = message[count:].tolist()
        doubt, old, new = numbers[depth + 1 : depth + 4]
        *valid, compared = [round(v * 1e6) >= 1e6 for v in numbers[depth + 4 : 2 * depth + 5]]
        mean, mean_square, num_residuals = numbers[2 * depth + 5 :]
        aligned = mean_square - mean**2 < 0.5 / self.ranks.size  # the variance of unequal counts is larger
        slots = self._slots(valid)
        matrix = torch.zeros(depth * depth, dtype=torch.float64, device="cpu")
        matrix[_upper(depth, torch.device("cpu"))] = message[:count]
        matrix = matrix.view(depth, depth)
        matrix = (matrix + matrix.triu(1).T)[slots][:, slots]
        projection = host_tensor([numbers[slot] for slot in slots])
        jump = new / old if old > 0 else 0.0
        gram = Gram(matrix, projection, numbers[depth])
        return Products(gram, slots, doubt, compared, jump, round(num_residuals), aligned)

    # ---- candidates ------------------------------------------------------------------------------------------------

    def place(self, slots: Sequence[int], coefficients: Tensor) -> None:
        """Put the candidate x_k - DX coefficients into the weights; the newest weights stay known."""
        placed = torch.zeros(self.depth, dtype=torch.float64, device="cpu")
        placed[list(slots)] = coefficients
        for block in self.blocks:
            kernels.combine(block.own_start, block.mapped, [(block.delta_mapped, placed)], None, None, block.fused)
        self._write([block.own_start for block in self.blocks])

    def put_back(self) -> None:
        """Put the newest weights back, bit for bit."""
        self._write([block.mapped for block in self.blocks])

    def take(self, flag: Tensor, residuals: Tensor) -> None:
        """Store the candidate and its residuals as the newest pair where `flag` holds, else the newest pair once more.

        The weights hold the newest pair's afterwards. The flag decides on its device.
        """
        assert self.residuals is not None
        for block in self.blocks:
            block.own_start.copy_(torch.where(handed(flag, block.own_start.device), block.own_start, block.mapped))
        self._write([block.own_start for block in self.blocks])
        self.push_weights()
        self.push_residuals(torch.where(flag, residuals, self.residuals.mapped))

    def _write(self, rows: Sequence[Tensor]) -> None:
        for block, row, values in zip(self.blocks, rows, self.tensors, strict=True):
            name = "own_start" if row is block.own_start else "mapped"
            block.row.write(block.views[name], values)

    # ---- memory and checkpoints ------------------------------------------------------------------------------------

    def rows(self) -> dict[str, Tensor]:
        """The vectors of this rank by name, for a checkpoint: those of a parameter in the shape that it has here."""
        rows: dict[str, Tensor] = {}
        for block, group in zip(self.blocks, self._groups, strict=True):
            for name in ("delta_mapped", "mapped"):
                tensor = block.tensors[name]
                views = block.row.logical_views(tensor)
                rows |= {f"parameters.{p}.{name}": view for (p, _), view in zip(group, views, strict=True)}
        for block in self._residual_blocks:
            rows |= {f"residuals.{name}": block.tensors[name] for name in ("delta_mapped", "mapped")}
        return {f"{self.begin}{name}": row for name, row in rows.items()}

    def plain_state(self) -> dict[str, Any]:
        """Everything besides the vectors, as plain values for a checkpoint."""
        return {
            "rank": [self.ranks.index, self.ranks.size],
            "pushed": self.pushed,
            "has_pair": self.has_pair,
            "valid": self.valid,
            "stale": self._stale,
            "matrix": self._matrix.tolist(),
            "numbers": [None if number is None else float(number) for number in (self.doubt, self._old, self._new)],
        }

    def fits(self, saved: dict[str, Any], rows: dict[str, Tensor]) -> bool:
        """Whether saved pairs fit here: the state has all of their rows, and is of this depth and this rank.

        Raises:
            ValueError: they belong to parameters of other shapes.
        """
        if len(saved["valid"]) != self.depth or saved["rank"] != [self.ranks.index, self.ranks.size]:
            return False
        wanted = self.rows()
        if not wanted.keys() <= rows.keys() or f"{self.begin}residuals.mapped" not in rows:
            return False
        check_rows({name: rows[name] for name in wanted}, wanted)
        return True

    def load(self, saved: dict[str, Any], rows: dict[str, Tensor]) -> None:
        """Continue with saved pairs that fit."""
        residuals = rows[f"{self.begin}residuals.mapped"]
        place = self.locals[0].device if self.locals else residuals.device
        device = residuals.device if place.type == "cpu" else place
        self._make_room(residuals.to(device))
        load_rows(rows, self.rows())
        self.pushed, self.has_pair = int(saved["pushed"]), bool(saved["has_pair"])
        self.valid, self._stale = list(map(bool, saved["valid"])), list(map(int, saved["stale"]))
        self._matrix.copy_(host_tensor(saved["matrix"]))
        self.doubt, self._old, self._new = (
            None if number is None else torch.tensor(number, dtype=torch.float64, device=device)
            for number in saved["numbers"]
        )

    def _make_room(self, residuals: Tensor) -> Block:
        """Allocate rows for residuals like these, shape (M,)."""
        self.residuals = block = self._allocated("residuals", [[residuals]])[0]
        self._matrix = torch.zeros(self.depth, self.depth, dtype=torch.float64, device=residuals.device)
        return block

    @property
    def _residual_blocks(self) -> list[Block]:
        return [] if self.residuals is None else [self.residuals]

    def _allocated(self, kind: str, tensors: Sequence[Tensors]) -> list[Block]:
        settings = self._settings

        def blocks(planned: bool) -> list[Block]:
            return [
                make_block(kind, [t for t in group if t is not None], self.depth, False, settings.history_dtype,
                           fused=settings.fused, planned=planned)
                for group in tensors
            ]  # fmt: skip

        return allocate(blocks, settings)


def planned_bytes(parameters: list[Tensor], settings: Settings) -> int:
    """Bytes of the rows for the weights, before there are any; those for residuals come with the first ones."""
    groups = [[local(p) for _, p in group] for group in grouped(parameters)]
    blocks = [
        make_block("parameters", group, settings.history_depth, False, settings.history_dtype, planned=True)
        for group in groups
    ]
    return sum(block.nbytes for block in blocks)


@cache
def _upper(depth: int, device: torch.device) -> Tensor:
    """Positions of the upper triangle of a flat matrix."""
    row, column = torch.triu_indices(depth, depth, device="cpu").unbind()
    return (row * depth + column).to(device)


def _mean_square(residuals: Tensor) -> Tensor:
    """||r||^2 / M in float64."""
    wide = residuals.double()
    return torch.dot(wide, wide) / max(1, wide.numel())
