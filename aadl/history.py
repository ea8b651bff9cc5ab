"""History of true pairs (x_j, g_j = G(x_j)) in difference form, and the two passes over memory that use it.

Per block of tensors: ring rows DF, DG of shape (depth, numel) and three vectors, the iterate x the running
macro-step starts from, and residual f and mapped iterate g of the newest stored pair. Storing writes one row of each
ring, Df = f_new - f and Dg = g_new - g. Differences cancel no digits, are exactly zero for what does not move, and
survive rounding to bfloat16.

A block of kind "momentum" follows the parameters with the same coefficients; its residuals enter the inner products
only when it has rows for them (state_coupling "full").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aadl.flat import FlatRow
from aadl.mixing import Gram

Tensors = Sequence[Tensor | None]
WIDE_PIECE = 16_384
WIDE_PIECE_ACCELERATOR = 1 << 20


@dataclass
class Block:
    """Rows of the tensors of one kind, dtype and device."""

    kind: str
    """"parameters" or "momentum"."""
    row: FlatRow
    has_residuals: bool
    delta_mapped: Tensor
    delta_residual: Tensor | None
    mapped: Tensor
    residual: Tensor | None
    own_start: Tensor
    start: Tensor
    """Where the running macro-step began: `own_start`, or `mapped` itself after a plain macro-step."""

    def __post_init__(self) -> None:
        self.candidate_views = self.row.views(self.own_start)
        self.mapped_views = self.row.views(self.mapped)
        self._scratch = torch.empty(0)

    def scratch(self, rows: int) -> Tensor:
        """A float64 work area of `rows` rows, kept between calls; small enough for the second-level cache of a CPU."""
        longest = WIDE_PIECE if self.row.device.type == "cpu" else WIDE_PIECE_ACCELERATOR
        shape = (rows, min(longest, self.row.numel))
        if self._scratch.shape != shape:
            self._scratch = torch.empty(shape, dtype=torch.float64, device=self.row.device)
        return self._scratch


@dataclass
class Column:
    """What is known of one stored difference besides its vectors."""

    macro_step: int
    consecutive: bool
    """Its second update starts where the first one ended."""
    learning_rate: float
    """Factor of the learning rate its residuals belong to."""


@dataclass
class History:
    """Ring of differences over several blocks.

    Args:
        depth: columns kept.
        blocks: from `make_block`.

    Columns are addressed oldest first; `order()` gives their ring slots.
    """

    depth: int
    blocks: list[Block]
    columns: list[Column] = field(default_factory=list)
    has_pair: bool = False
    _next: int = 0
    _grams: dict[str, Tensor] = field(default_factory=dict)
    _stale: list[int] = field(default_factory=list)

    # ---- macro-steps -------------------------------------------------------------------------------------------

    def begin(self, tensors: Sequence[Tensors]) -> None:
        """Take the present values as the start x of a macro-step."""
        for block, values in zip(self.blocks, tensors, strict=True):
            for part, value in block.row.read(values):
                block.own_start[part].copy_(value)
            block.start = block.own_start

    def starts_at(self, tensors: Sequence[Tensors]) -> bool:
        """Whether the running macro-step starts at these values."""
        return self.has_pair and all(
            block.row.equals(block.mapped_views if block.start is block.mapped else block.candidate_views, values)
            for block, values in zip(self.blocks, tensors, strict=True)
        )

    def continue_from_mapped(self) -> None:
        """The next macro-step starts at the newest mapped iterate (no copy)."""
        for block in self.blocks:
            block.start = block.mapped

    def continue_from_candidate(self) -> None:
        """The next macro-step starts at the last candidate (no copy)."""
        for block in self.blocks:
            block.start = block.own_start

    def residual_squares(self, tensors: Sequence[Tensors]) -> dict[str, float]:
        """||f||^2 of the macro-step that ends at `tensors`, by kind, in float64, without storing it."""
        sums: dict[str, Tensor] = {}
        for block, values in zip(self.blocks, tensors, strict=True):
            if not block.has_residuals:
                continue
            total = torch.zeros((), dtype=torch.float64, device=block.row.device)
            for part, value in block.row.read(values):
                total += torch.linalg.vector_norm(value - block.start[part], dtype=torch.float64).square()
            sums[block.kind] = sums.get(block.kind, 0) + total.cpu()
        return {kind: float(total) for kind, total in sums.items()}

    def push(self, tensors: Sequence[Tensors], column: Column, learning_rate_ratio: float = 1.0) -> None:
        """Store the pair (start, values of `tensors`).

        With learning_rate_ratio rho != 1 the previous residual is first brought to the present learning rate,
        f <- rho f and g <- x + rho f, so that the difference belongs to one map.
        """
        slot = self._next if self.has_pair else None
        for block, values in zip(self.blocks, tensors, strict=True):
            _push_block(block, values, slot, learning_rate_ratio if block.kind == "parameters" else 1.0)
        if slot is not None:
            self._next = (slot + 1) % self.depth
            self.columns = [*self.columns, column][-self.depth :]
            self._stale = [*(s for s in self._stale if s != slot), slot]
        self.has_pair = True

    def clear(self) -> None:
        """Forget all pairs. The running macro-step keeps its start."""
        for block in self.blocks:
            if block.start is not block.own_start:
                block.own_start.copy_(block.start)
                block.start = block.own_start
        self.columns, self._stale, self._next, self.has_pair = [], [], 0, False

    def order(self) -> list[int]:
        """Ring slots, oldest column first."""
        count = len(self.columns)
        return [(self._next - count + i) % self.depth for i in range(count)]

    # ---- pass 1: inner products --------------------------------------------------------------------------------

    def gram(self) -> dict[str, Gram]:
        """Inner products by kind, unscaled, columns oldest first. One read of DF; one transfer to the host."""
        count, order = len(self.columns), self.order()
        result: dict[str, Gram] = {}
        for kind in dict.fromkeys(block.kind for block in self.blocks if block.has_residuals):
            own = [block for block in self.blocks if block.kind == kind]
            products = sum(_inner_products(block, count, self._stale).cpu() for block in own)
            assert isinstance(products, Tensor)
            matrix = self._grams.setdefault(kind, products.new_zeros(self.depth, self.depth))
            for row, slot in zip(products.T, self._stale, strict=False):
                matrix[slot, :count] = row[:count]
                matrix[:count, slot] = row[:count]
            projection = _oldest_first(products[:, -1], order, 1)
            result[kind] = Gram(_oldest_first(matrix, order, 2), projection, float(products[-1, -1]))
        self._stale = []
        return result

    # ---- pass 2: combination -----------------------------------------------------------------------------------

    def combine(self, mapped_coefficients: Tensor, residual_coefficients: Tensor, residual_factor: float) -> None:
        """candidate = g - DG a - DF b - c f, written where the next macro-step may start.

        Args:
            mapped_coefficients: a, shape (columns,), oldest first.
            residual_coefficients: b, shape (columns,); zeros cost nothing. Applied to the parameters only.
            residual_factor: c. Applied to the parameters only.
        """
        slots = self.order()
        for block in self.blocks:
            target, row_dtype = block.own_start, block.row.dtype
            _subtract(block, block.delta_mapped, _by_slot(mapped_coefficients, slots, self.depth), block.mapped)
            if block.kind != "parameters":
                continue
            if block.delta_residual is not None and bool(residual_coefficients.any()):
                _subtract(block, block.delta_residual, _by_slot(residual_coefficients, slots, self.depth), target)
            if residual_factor and block.residual is not None:
                target.sub_(block.residual.to(row_dtype), alpha=residual_factor)

    def advance(self, mean_coefficients: Tensor) -> float:
        """<candidate - g, f - DF s>: how far the candidate goes along the (mean) update, over the parameters.

        Args:
            mean_coefficients: s, shape (columns,), oldest first; zeros (the newest residual itself) cost nothing.
        """
        slots, total = self.order(), 0.0
        mean = _by_slot(mean_coefficients, slots, self.depth) if bool(mean_coefficients.any()) else None
        for block in self.blocks:
            if block.kind != "parameters" or block.residual is None or block.delta_residual is None:
                continue
            dots = torch.zeros((), dtype=torch.float64, device=block.row.device)
            for part in block.row.ranges():
                correction, update = block.own_start[part] - block.mapped[part], block.residual[part]
                if mean is not None:
                    rows = block.delta_residual[: mean.numel(), part].to(update.dtype)
                    update = torch.addmv(update, rows.T, mean.to(update), alpha=-1)
                dots += torch.dot(correction.double(), update.double())
            total += float(dots)
        return total

    def write_candidate(self, tensors: Sequence[Tensors]) -> None:
        """Copy the candidate into the tensors."""
        for block, values in zip(self.blocks, tensors, strict=True):
            block.row.write(block.candidate_views, values)

    def write_mapped(self, tensors: Sequence[Tensors]) -> None:
        """Copy the newest mapped iterate into the tensors: bit for bit what the base optimizer had left."""
        for block, values in zip(self.blocks, tensors, strict=True):
            block.row.write(block.mapped_views, values)

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; slots keep their places, so that a resumed run repeats every rounding."""
        blocks = []
        for block in self.blocks:
            entry: dict[str, Any] = {
                "kind": block.kind,
                "shapes": [list(shape) for shape in block.row.shapes],
                "orders": [None if order is None else list(order) for order in block.row.orders],
                "delta_mapped": block.delta_mapped,
                "mapped": block.mapped,
                "start": None if block.start is block.mapped else block.start,
            }
            if block.delta_residual is not None and block.residual is not None:
                entry |= {"delta_residual": block.delta_residual, "residual": block.residual}
            blocks.append(entry)
        columns = [[c.macro_step, c.consecutive, c.learning_rate] for c in self.columns]
        return {
            "depth": self.depth,
            "blocks": blocks,
            "columns": columns,
            "has_pair": self.has_pair,
            "next": self._next,
            "grams": dict(self._grams),
            "stale": list(self._stale),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises ValueError where depth, shapes or memory order differ."""
        if state["depth"] != self.depth:
            raise ValueError(f"the saved history has history_depth {state['depth']}, this accelerator {self.depth}")
        if len(state["blocks"]) != len(self.blocks):
            raise ValueError(
                f"the saved history has {len(state['blocks'])} blocks, this accelerator {len(self.blocks)}"
            )
        for block, entry in zip(self.blocks, state["blocks"], strict=True):
            shapes = [tuple(shape) for shape in entry["shapes"]]
            orders = [None if order is None else tuple(order) for order in entry["orders"]]
            if entry["kind"] != block.kind or shapes != block.row.shapes or orders != block.row.orders:
                raise ValueError("the saved history belongs to parameters of other shapes or memory formats")
        for block, entry in zip(self.blocks, state["blocks"], strict=True):
            block.delta_mapped.copy_(entry["delta_mapped"])
            block.mapped.copy_(entry["mapped"])
            if block.delta_residual is not None and block.residual is not None:
                block.delta_residual.copy_(entry["delta_residual"])
                block.residual.copy_(entry["residual"])
            block.start = block.mapped
            if entry["start"] is not None:
                block.start = block.own_start
                block.own_start.copy_(entry["start"])
        self.columns = [Column(int(m), bool(c), float(r)) for m, c, r in state["columns"]]
        self.has_pair, self._next = bool(state["has_pair"]), int(state["next"])
        self._grams = {
            kind: matrix.detach().to("cpu", torch.float64).clone() for kind, matrix in state["grams"].items()
        }
        self._stale = [int(slot) for slot in state["stale"]]


def make_block(kind: str, templates: Sequence[Tensor], depth: int, residuals: bool, dtype: torch.dtype | None) -> Block:
    """Allocate the rows of one block: (1 or 2) depth numel + (2 or 3) numel elements.

    Args:
        kind: "parameters" or "momentum".
        templates: tensors of one dtype and device.
        depth: rows of each ring.
        residuals: whether residual differences are kept, i.e. whether the block enters the inner products.
        dtype: of the ring rows; None for that of the tensors. The three vectors keep the tensors' dtype.
    """
    row = FlatRow(templates)

    def vector() -> Tensor:
        return torch.zeros(row.numel, dtype=row.dtype, device=row.device)

    def ring() -> Tensor:
        return torch.zeros(depth, row.numel, dtype=dtype or row.dtype, device=row.device)

    own_start = vector()
    return Block(
        kind,
        row,
        residuals,
        delta_mapped=ring(),
        delta_residual=ring() if residuals else None,
        mapped=vector(),
        residual=vector() if residuals else None,
        own_start=own_start,
        start=own_start,
    )


def _push_block(block: Block, values: Tensors, slot: int | None, ratio: float) -> None:
    for part, value in block.row.read(values):
        mapped = block.mapped[part]
        if block.residual is not None and block.delta_residual is not None:
            residual = block.residual[part]
            new = value - block.start[part]
            if slot is not None:
                torch.sub(new, residual, alpha=ratio, out=block.delta_residual[slot, part])
                if ratio != 1:
                    mapped.add_(residual, alpha=ratio - 1)
            residual.copy_(new)
        if slot is not None:
            torch.sub(value, mapped, out=block.delta_mapped[slot, part])
        mapped.copy_(value)


def _inner_products(block: Block, filled: int, slots: Sequence[int]) -> Tensor:
    """Products of the filled rows and of f with the rows `slots` and with f, shape (filled + 1, slots + 1), float64.

    Pieces are widened to float64, in which products of float32 numbers are exact, before they are multiplied.
    """
    assert block.delta_residual is not None and block.residual is not None
    ring, residual, row = block.delta_residual, block.residual, block.row
    wide = block.scratch(filled + 1)
    length = wide.shape[1]
    products = torch.zeros(len(slots) + 1, filled + 1, dtype=torch.float64, device=row.device)
    for start in range(0, row.numel, max(length, 1)):
        stop = min(start + length, row.numel)
        piece = wide[:, : stop - start]
        piece[:filled].copy_(ring[:filled, start:stop])
        piece[filled].copy_(residual[start:stop])
        for index, slot in enumerate([*slots, filled]):
            products[index].addmv_(piece, piece[slot])
    return products.T


def _oldest_first(values: Tensor, order: list[int], dimensions: int) -> Tensor:
    """Rows (and columns) in the order of the columns: a rotation of the ring."""
    count = len(order)
    for dimension in range(dimensions):
        values = values.narrow(dimension, 0, count)
    shift = -order[0] if order else 0
    return values.roll([shift] * dimensions, list(range(dimensions))) if shift else values.clone()


def _by_slot(coefficients: Tensor, slots: Sequence[int], depth: int) -> Tensor:
    """Coefficients ordered oldest first, moved to their ring slots."""
    placed = torch.zeros(min(depth, len(slots)), dtype=torch.float64, device="cpu")
    placed[list(slots)] = coefficients
    return placed


def _subtract(block: Block, ring: Tensor, coefficients: Tensor, base: Tensor) -> None:
    """own_start = base - ring' coefficients."""
    row, target = block.row, block.own_start
    factors = coefficients.to(device=row.device, dtype=row.dtype)
    rows = ring[: factors.numel()]
    if ring.dtype == row.dtype:
        torch.addmv(base, rows.T, factors, alpha=-1, out=target)
        return
    for part in row.ranges():
        torch.addmv(base[part], rows[:, part].to(row.dtype).T, factors, alpha=-1, out=target[part])
