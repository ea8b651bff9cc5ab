"""A block: the rows of the tensors of one kind, dtype and device, and how a pair is stored in them.

A block has ring rows DF, DG of shape (depth, numel) and three vectors: the iterate x that the running macro-step starts
from, and residual f and mapped iterate g of the newest stored pair. Storing a pair writes one row of each ring,
Df = f_new - f and Dg = g_new - g. Differences cancel no digits, are exactly zero for what does not move, and survive
rounding to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aadl import kernels, memory
from aadl.flat import FlatRow
from aadl.memory import zeros
from aadl.settings import Settings

Tensors = Sequence[Tensor | None]


@dataclass
class Block:
    """Rows of the tensors of one kind, dtype, device and number of copies."""

    kind: str
    """"parameters" or "momentum"."""
    row: FlatRow
    weight: float
    """Weight of its products in a sum over the ranks that hold parts: one over the number of copies."""
    fused: bool
    delta_mapped: Tensor
    delta_residual: Tensor | None
    mapped: Tensor
    residual: Tensor | None
    own_start: Tensor
    start: Tensor
    """Where the running macro-step began: `own_start`, or `mapped` itself after a plain macro-step."""
    measured: Tensor | None = None
    """||f||^2, (eps ||g||)^2, ||s||^2 and <f, s> of the newest pair, float64 of shape (4,); None unless its push
    measured them. The jump s leads from the last mapped iterate to the start of the pair; eps is that of the
    tensors."""
    offloaded: bool = False
    """Whether the rows lie on the host and the tensors do not."""
    stage: Tensor | None = None
    """Row on the host in which the tensors of a device arrive."""
    _arrival: torch.cuda.Event | None = None
    _fetched: bool = False

    def __post_init__(self) -> None:
        whole = not self.is_window
        self.views = {
            "own_start": self.row.views(self.own_start) if whole else [],
            "mapped": self.row.views(self.mapped) if whole else [],
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All rows by name."""
        named = {
            "delta_mapped": self.delta_mapped,
            "delta_residual": self.delta_residual,
            "mapped": self.mapped,
            "residual": self.residual,
            "start": self.own_start,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        stage = self.mapped.nbytes if self.offloaded else 0
        return sum(tensor.nbytes for tensor in self.tensors.values()) + stage

    @property
    def is_window(self) -> bool:
        return self.row.is_window

    def forget_fetch(self) -> None:
        """Drop the copy that is on its way to the host."""
        self._fetched, self._arrival = False, None

    def read(self, values: Tensors) -> Iterator[tuple[slice, Tensor]]:
        """Yield the tensors in pieces (range of the row, values), on the device of the rows."""
        if not self.offloaded:
            yield from self.row.read(values)
            return
        if not self._fetched:
            self.fetch(values)
        if self._arrival is not None:
            self._arrival.synchronize()
        self._fetched = False
        assert self.stage is not None
        for part in self.row.ranges(kernels.HOST_PIECE):
            yield part, self.stage[part]

    def fetch(self, values: Tensors) -> None:
        """Queue the copy of the tensors to the host; `read` waits for it."""
        assert self.stage is not None
        for part, value in self.row.read(values):
            self.stage[part].copy_(value, non_blocking=True)
        if self.row.device.type == "cuda":
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record(torch.cuda.current_stream(self.row.device))
        self._fetched = True


def make_block(
    kind: str,
    templates: Sequence[Tensor],
    depth: int,
    residuals: bool,
    dtype: torch.dtype | None,
    *,
    part: tuple[int, int] = (0, 1),
    weight: float = 1.0,
    fused: bool = False,
    device: torch.device | None = None,
    planned: bool = False,
) -> Block:
    """Allocate the rows of one block: (1 or 2) depth numel + (2 or 3) numel elements, numel more if not on its device.

    Args:
        kind: "parameters" or "momentum".
        templates: tensors of one dtype and device.
        depth: rows of each ring.
        residuals: whether residual differences are kept, i.e. whether the block enters the inner products.
        dtype: of the ring rows; None for that of the tensors. The three vectors keep the tensors' dtype.
        part: (index, count) of the window of the flat row to keep.
        weight: see `Block`.
        fused: whether kernels that torch.compile makes are used where the row is long enough for them.
        device: of the rows; None for that of the tensors.
        planned: whether to allocate nothing and leave the rows without values, so that only `Block.nbytes` is asked.
    """
    place = templates[0].device if device is None else device
    numel = sum(template.numel() for template in templates) // part[1]
    compiled = fused and numel >= kernels.SHORTEST_ROW
    row = FlatRow(templates, part, cut=not compiled and not planned)
    offloaded = place.type != row.device.type
    pinned = place.type == "cpu" and row.device.type == "cuda" and not planned
    there = torch.device("meta") if planned else place

    def vector() -> Tensor:
        return zeros((row.numel,), row.dtype, there, pinned)

    def ring() -> Tensor:
        return zeros((depth, row.numel), dtype or row.dtype, there, pinned)

    own_start = vector()
    return Block(
        kind,
        row,
        weight,
        compiled,
        delta_mapped=ring(),
        delta_residual=ring() if residuals else None,
        mapped=vector(),
        residual=vector() if residuals else None,
        own_start=own_start,
        start=own_start,
        offloaded=offloaded,
        stage=vector() if offloaded else None,
    )


def allocate(blocks: Callable[[bool], list[Block]], settings: Settings) -> list[Block]:
    """Allocate blocks, all or none of them.

    Args:
        blocks: makes them; called with whether they are only `planned`.
        settings: history_device, and what an error may name.

    Raises:
        torch.OutOfMemoryError: there is no room for their rows.
    """
    need = memory.Need({}, {})
    for block in blocks(True):
        place = block.row.device if settings.history_device is None else torch.device(settings.history_device)
        need.nbytes[place] = need.nbytes.get(place, 0) + block.nbytes
        need.elements[block.kind] = need.elements.get(block.kind, 0) + block.row.numel
    memory.check_room(need, settings)
    try:
        return blocks(False)
    except (RuntimeError, MemoryError, OSError) as error:
        if not memory.is_out_of_memory(error):
            raise
    raise memory.no_room(need, settings)  # outside of the except clause, whose frames would keep the allocated rows


def push_block(
    block: Block,
    values: Tensors,
    slot: int | None,
    ratio: float = 1.0,
    keep_last: bool = False,
    measure: str = "",
    alone: bool = True,
) -> None:
    """Store the newest pair of one block, see `History.push`.

    Args:
        slot: row of the rings that takes the differences, None for the first pair.
        alone: whether compiled kernels may measure, which round differently on ranks without a compiler.
    """
    from_mapped = block.start is block.mapped
    delta_mapped = None if slot is None else block.delta_mapped[slot]
    delta_residual = None if slot is None or block.delta_residual is None else block.delta_residual[slot]
    total: Tensor | None = None
    for part, value in block.read(values):
        mapped = block.mapped[part]
        start = mapped if from_mapped else block.start[part]
        residual = None if block.residual is None else block.residual[part]
        rows = None
        if delta_mapped is not None:
            rows = None if delta_residual is None else delta_residual[part], delta_mapped[part]
        kept = start if keep_last and not from_mapped else block.own_start[part] if keep_last else None
        origin = {"": None, "jump": mapped, "kept": block.own_start[part]}[measure]
        numbers = None if origin is None or alone else kernels.measured(value, start, origin)
        origin = origin if alone else None
        made = kernels.store(value, start, residual, mapped, rows, ratio, kept, block.fused, origin)
        numbers = made if numbers is None else numbers
        total = numbers if total is None or numbers is None else total + numbers
    if total is not None:
        total[1] *= torch.finfo(block.row.dtype).eps ** 2
    block.measured = total
