"""History of true pairs (x_j, g_j = G(x_j)) in difference form, and the two passes over memory that use it.

The vectors lie in blocks (`aadl.block`), one for each kind, dtype and device. A block of kind "momentum" follows the
parameters with the same coefficients; its residuals enter the inner products only when it has rows for them
(state_coupling "full").

On several ranks a block holds the part of the tensors that lies here: all of them (replicas), the local shards of
DTensors, or a window of the flat row (sharded history). Inner products are sums over the ranks, each copy weighted by
one over the number of copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aadl import compilation, kernels
from aadl.block import Block, Tensors, push_block
from aadl.deferred import handed
from aadl.mixing import Gram, filled_products, host_tensor, needed_products
from aadl.ranks import Ranks

KINDS: tuple[str, ...] = ("parameters", "momentum")
ROTATED = 1 << 18
"""Elements of a row that are moved at a time."""


@dataclass
class Column:
    """One stored difference, without its vectors."""

    macro_step: int
    consecutive: bool
    """Its second update starts where the first one ended."""
    learning_rate: float
    """Factor of the learning rate its residuals belong to."""
    jump: dict[str, float] = field(default_factory=dict)
    """By kind, the squared distance between the first update's end and the second one's start, where they differ."""
    earlier_rate: float = 1.0
    """Factor of the learning rate that its first update was made with."""
    moved: bool = False
    """Its second update starts where somebody else has put the weights."""
    written: float | None = None
    """How far, at least, somebody else has led the weights within its second update; None where nobody has."""
    warm_up: bool = False
    """Its second update was made at a higher learning rate than all before, see `LearningRates.warm_up`."""


@dataclass
class History:
    """Ring of differences over several blocks.

    Args:
        depth: columns kept.
        blocks: from `make_block`.
        ranks: those whose sums make the inner products.
        partial: whether this rank holds a part of the vectors only, so that every product needs a sum over the ranks.
            Complete replicas sum nothing here; they agree on the mixing problem (aadl.acceptance).

    Columns are addressed oldest first; `order()` gives their ring slots.
    """

    depth: int
    blocks: list[Block]
    ranks: Ranks = field(default_factory=Ranks)
    partial: bool = False
    columns: list[Column] = field(default_factory=list)
    has_pair: bool = False
    next: int = 0
    """Slot that the next difference is written to."""
    grams: dict[str, list[list[float]]] = field(default_factory=dict)
    """Products of the rows by kind and slot, where they are not stale."""
    stale: list[int] = field(default_factory=list)
    """Slots written since the last call of `gram`."""
    _rise: Tensor | float = field(default=0.0, init=False)
    """Of this rank's losses over the macro-step of the newest pair."""

    # ---- macro-steps -----------------------------------------------------------------------------------------------

    def begin(self, tensors: Sequence[Tensors]) -> None:
        """Take the present values as the start x of a macro-step."""
        for block, values in zip(self.blocks, tensors, strict=True):
            for part, value in block.read(values):
                block.own_start[part].copy_(value)
            block.start = block.own_start

    def starts_at(self, tensors: Sequence[Tensors]) -> bool:
        """Whether the running macro-step starts at exactly these values, on all ranks that hold parts."""
        if not self.has_pair:
            return False
        same = all(
            all(torch.equal(block.start[part], value) for part, value in block.read(values))
            for block, values in zip(self.blocks, tensors, strict=True)
        )
        return same if not self.partial else not float(self.ranks.total(host_tensor(float(not same))))

    def continue_from_mapped(self) -> None:
        """Start the next macro-step at the newest mapped iterate (no copy)."""
        self.start_from(kept=False)

    def fetch(self, tensors: Sequence[Tensors]) -> None:
        """Queue the copy of the tensors to a history on the host, which the next `push` waits for."""
        for block, values in zip(self.blocks, tensors, strict=True):
            if block.offloaded:
                block.fetch(values)

    def push(
        self,
        tensors: Sequence[Tensors],
        column: Column,
        learning_rate_ratio: float = 1.0,
        keep_last: bool = False,
        measure: str = "jump",
        rise: Tensor | float = 0.0,
    ) -> None:
        """Store the pair (start, values of `tensors`); the next macro-step starts at these values.

        With learning_rate_ratio rho != 1 the previous residual is first brought to the present learning rate,
        f <- rho f and g <- x + rho f, so that the difference belongs to one map. With `keep_last` the mapped iterate
        of the pair before goes where the start was, from where `take` can bring it back. Unless `measure` is "", the
        blocks keep the numbers of `Block.measured`, which `gram` and `measurements` need: s leads to the start from
        the last mapped iterate ("jump") or, where an earlier push has kept one that is still there, from that ("kept").
        `rise` (`aadl.losses.Losses.rise`) is summed over the ranks with the numbers that decide.
        """
        slot = self.next if self.has_pair else None
        alone = self.partial or self.ranks.size == 1  # replicas must not differ by how they were compiled
        for block, values in zip(self.blocks, tensors, strict=True):
            ratio = learning_rate_ratio if block.kind == "parameters" else 1.0
            push_block(block, values, slot, ratio, keep_last, measure, alone)
        if slot is not None:
            self.next = (slot + 1) % self.depth
            self.columns = [*self.columns, column][-self.depth :]
            self.stale = [*(s for s in self.stale if s != slot), slot]
        self.has_pair, self._rise = True, rise
        self.continue_from_mapped()

    def clear(self, wipe: bool = False) -> None:
        """Forget all pairs; with `wipe` the rows too (they hold inf or nan). The running macro-step goes on."""
        for block in self.blocks:
            for name, tensor in block.tensors.items():
                if (wipe or block.fused) and name.startswith("delta"):  # compiled kernels read unused rows too
                    tensor.zero_()
        self.columns, self.stale, self.next, self.has_pair = [], [], 0, False

    def forget_last(self, count: int) -> None:
        """Forget the newest `count` columns and the pair; those before stay. The running macro-step goes on."""
        kept = max(0, len(self.columns) - count)
        first = self.order()[0] if kept else 0
        for block in self.blocks:
            for name, tensor in block.tensors.items():
                if not name.startswith("delta"):
                    continue
                for part in block.row.ranges(ROTATED) if first else ():  # a ring that is not full begins at slot 0
                    tensor[:, part] = tensor[:, part].roll(-first, 0)
                if block.fused:  # compiled kernels read unused rows too
                    tensor[kept:].zero_()
        self.columns, self.next, self.has_pair = self.columns[:kept], kept % self.depth, False
        self.stale = list(range(kept))

    @property
    def fused(self) -> bool:
        """Whether compiled kernels are used."""
        return any(block.fused for block in self.blocks) and not compilation.failure()

    @property
    def replicas(self) -> bool:
        """Whether other ranks hold the same whole vectors."""
        return self.ranks.size > 1 and not self.partial

    @property
    def sums(self) -> bool:
        """Whether `gram` is a sum over the ranks.

        Replicas on devices sum there, before the host waits for the products, though they make the same ones.
        """
        return self.partial or (self.replicas and self._device().type != "cpu")

    def order(self) -> list[int]:
        """Ring slots, oldest column first."""
        count = len(self.columns)
        return [(self.next - count + i) % self.depth for i in range(count)]

    # ---- pass 1: inner products ------------------------------------------------------------------------------------

    def gram(self) -> dict[str, Gram]:
        """Inner products by kind, unscaled, columns oldest first, see `gram_with`."""
        return self.gram_with([])[0]

    def _rise_on(self, device: torch.device) -> Tensor:
        """The rise as a vector of one number."""
        if isinstance(self._rise, Tensor):
            return self._rise.to(device, torch.float64).view(1)
        return torch.full((1,), self._rise, dtype=torch.float64, device=device)

    def gram_with(self, own: list[float]) -> tuple[dict[str, Gram], list[float]]:
        """Inner products by kind, and the numbers `own` and the rise, summed over ranks if the products are (`sums`).

        One read of DF, one transfer to the host, one sum over the ranks where they hold parts (or lie on devices). Only
        products with columns stored since the last call are computed: with r of them among m columns the ranks exchange
        r m - r (r - 1) / 2 + m + 1 products and three other numbers of `Block.measured` for each kind, `own` and the
        rise.
        """
        count, order = len(self.columns), self.order()
        result: dict[str, Gram] = {}
        parts, own = self._fresh_products(count, own)
        for kind, (products, numbers) in parts.items():
            known = self.grams.setdefault(kind, [[0.0] * self.depth for _ in range(self.depth)])
            *fresh, last = products.tolist()  # Python is faster than tensor calls at this size
            for slot, row in zip(self.stale, fresh, strict=True):
                for other in order:
                    known[slot][other] = known[other][slot] = row[other]
            matrix = host_tensor([[known[i][j] for j in order] for i in order]).view(count, count)
            result[kind] = Gram(matrix, host_tensor([last[i] for i in order]), last[-1], *numbers.tolist())
        self.stale = []
        return result, own

    def _fresh_products(self, count: int, own: list[float]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[float]]:
        """Per kind, on the host, summed over ranks: products of the stale columns and of f with all columns and f, and
        what the push has measured besides ||f||^2; and the sums of `own` and of the rise."""
        kinds = [kind for kind in KINDS if any(b.kind == kind and b.residual is not None for b in self.blocks)]
        if self.partial:  # ranks without a tensor take part in the sum too
            kinds = list(KINDS)
        shape, device = (len(self.stale) + 1, count + 1), self._device()
        sums = torch.zeros(len(kinds), *shape, dtype=torch.float64, device=device)
        numbers = torch.zeros(len(kinds), 3, dtype=torch.float64, device=device)
        for block in self.blocks:
            if block.residual is None or block.delta_residual is None:
                continue
            products = kernels.inner_products(block.delta_residual, block.residual, count, self.stale, block.fused)
            weight = block.weight if self.partial else 1 / self.ranks.size if self.sums else 1.0
            sums[kinds.index(block.kind)].add_(products.to(device), alpha=weight)
            if block.measured is not None:
                numbers[kinds.index(block.kind)].add_(block.measured[1:].to(device), alpha=weight)
        if not self.sums:
            there = torch.cat([sums.flatten(1), numbers], 1)
            message = torch.cat([there.view(-1), self._rise_on(device)]).cpu()
            rows_here = message[:-1].view(there.shape)
            rows = {kind: (row[:-3].view(shape), row[-3:]) for kind, row in zip(kinds, rows_here, strict=True)}
            return rows, [*own, float(message[-1])]
        needed = needed_products(tuple(self.stale), count)
        rows_there = torch.cat([sums.flatten(1).index_select(1, handed(needed, device)), numbers], 1)
        message = torch.cat([rows_there.view(-1), handed(host_tensor(own), device), self._rise_on(device)])
        message = self.ranks.total(message).cpu()
        rows_here = message[: rows_there.numel()].view(rows_there.shape)
        parts = [(filled_products(row[:-3], needed, shape, self.stale), row[-3:]) for row in rows_here]
        return dict(zip(kinds, parts, strict=True)), message[rows_there.numel() :].tolist()

    def measurements(self) -> Tensor:
        """`Block.measured` of the newest pair by kind, shape (kinds, 4), on the device; a sum over ranks with parts."""
        sums = self._own_measurements()
        return self.ranks.total(sums) if self.partial else sums

    def measurements_with(self, own: list[float]) -> tuple[Tensor, Tensor]:
        """The measurements as a mean over replicas, and the numbers `own` and the rise, summed over the ranks."""
        sums = self._own_measurements()
        if self.replicas:
            sums /= self.ranks.size
        message = torch.cat([sums.view(-1), handed(host_tensor(own), sums.device), self._rise_on(sums.device)])
        message = self.ranks.total(message)
        return message[: sums.numel()].view(sums.shape), message[sums.numel() :]

    def _own_measurements(self) -> Tensor:
        sums = torch.zeros(len(KINDS), 4, dtype=torch.float64, device=self._device())
        for block in self.blocks:
            if block.residual is not None and block.measured is not None:
                sums[KINDS.index(block.kind)] += (block.measured * block.weight).to(sums.device)
        return sums

    def _device(self) -> torch.device:
        return self.blocks[0].mapped.device if self.blocks else torch.device("cpu")

    # ---- pass 2: combination ---------------------------------------------------------------------------------------

    def combine(
        self,
        mapped_coefficients: Tensor,
        residual_coefficients: Tensor,
        residual_factor: float,
        mean_coefficients: Tensor | None = None,
        fused: bool = True,
    ) -> Tensor | None:
        """candidate = g - DG a - DF b - c f, written where the next macro-step may start.

        Args:
            mapped_coefficients: a, shape (columns,), oldest first.
            residual_coefficients: b, shape (columns,); zeros cost nothing. Applied to the parameters only.
            residual_factor: c. Applied to the parameters only.
            mean_coefficients: s, shape (columns,), or None.
            fused: whether compiled kernels may be used, which round differently.

        Returns:
            With `mean_coefficients`, how far the candidate goes along the (mean) update over the parameters,
            <candidate - g, f - DF s>, a float64 scalar on the device, the same on all ranks; else None.
        """
        slots = self.order()
        advance = None if mean_coefficients is None else torch.zeros((), dtype=torch.float64, device=self._device())
        for block in self.blocks:
            terms = [(block.delta_mapped, _by_slot(mapped_coefficients, slots, self.depth))]
            residual = along = None
            if block.kind == "parameters" and block.residual is not None and block.delta_residual is not None:
                if bool(residual_coefficients.any()):
                    terms.append((block.delta_residual, _by_slot(residual_coefficients, slots, self.depth)))
                if residual_factor:
                    residual = block.residual, residual_factor
                if mean_coefficients is not None:
                    used = mean_coefficients.nonzero().view(-1).tolist()
                    rows = [block.delta_residual[slots[i]] for i in used]
                    along = block.residual, rows, mean_coefficients[used]
            part = kernels.combine(block.own_start, block.mapped, terms, residual, along, fused and block.fused)
            if part is not None and advance is not None:
                advance += part.to(advance.device) * block.weight
        if advance is None:
            return None
        return self.ranks.total(advance) / (self.ranks.size if self.replicas else 1)

    def take(self, flag: Tensor | bool, tensors: Sequence[Tensors]) -> None:
        """If `flag` holds, copy the start into the tensors (a candidate, or the iterate that a push kept).

        The tensors hold the newest mapped iterate and keep it where the flag does not hold; the next macro-step
        starts at what they hold afterwards. A flag on a device decides there; the host does not wait.
        """
        if isinstance(flag, bool):
            if flag:
                self._write([block.own_start for block in self.blocks], tensors)
            self.start_from(kept=flag)
            return
        for block, row in zip(self.blocks, self._chosen(flag), strict=True):
            block.own_start.copy_(row)
        self._write([block.own_start for block in self.blocks], tensors)
        self.start_from(kept=True)

    def put_back(self, flag: Tensor, tensors: Sequence[Tensors]) -> None:
        """Do what `take` does with a flag on a device, but leave the kept start; `start_from` has to follow."""
        self._write(list(self._chosen(flag)), tensors)

    def start_from(self, kept: bool) -> None:
        """Start the next macro-step at the values in `own_start`, or at the newest mapped iterate (no copy)."""
        for block in self.blocks:
            block.start = block.own_start if kept else block.mapped

    def _chosen(self, flag: Tensor) -> Iterator[Tensor]:
        for block in self.blocks:
            yield torch.where(flag.to(block.mapped.device, non_blocking=True), block.own_start, block.mapped)

    def average(self, own: bool, ranks: Ranks, tensors: Sequence[Tensors]) -> None:
        """Average the newest mapped iterates (into the tensors) and the candidates over ranks whose weights differ.

        Args:
            own: whether this rank has a candidate; without one its mapped iterate stands in.
        """
        for block, values in zip(self.blocks, tensors, strict=True):
            if not own:
                block.own_start.copy_(block.mapped)
            block.own_start.copy_(ranks.total(block.own_start).div_(ranks.size))
            plain = ranks.total(block.mapped.clone()).div_(ranks.size)
            block.row.write(block.row.views(plain), values)

    def write_mapped(self, tensors: Sequence[Tensors]) -> None:
        """Copy the newest mapped iterate into the tensors: bit for bit what the base optimizer had left."""
        self._write([block.mapped for block in self.blocks], tensors)

    def _write(self, rows: Sequence[Tensor], tensors: Sequence[Tensors]) -> None:
        for block, row, values in zip(self.blocks, rows, tensors, strict=True):
            block.row.write(self._views(block, row), values, non_blocking=block.offloaded)

    def _views(self, block: Block, row: Tensor) -> list[Tensor]:
        """The parts of a row that belong to the tensors; those of the block's own rows are made once."""
        if block.is_window:
            return block.row.views(self.ranks.gathered(row, block.row.window_length)[: block.row.whole])
        if row is block.own_start or row is block.mapped:
            return block.views["own_start" if row is block.own_start else "mapped"]
        return block.row.views(row)


def _by_slot(coefficients: Tensor, slots: Sequence[int], depth: int) -> Tensor:
    """Coefficients ordered oldest first, moved to their ring slots; zero for slots without a column."""
    placed = torch.zeros(depth, dtype=torch.float64, device="cpu")
    placed[list(slots)] = coefficients
    return placed
