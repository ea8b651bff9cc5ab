"""Lists of tensors seen as one contiguous row, read and written in pieces that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CPU_PIECE = 65_536
"""Elements per piece on a CPU: a few float32 pieces fit into a core's second-level cache."""


class _Span(NamedTuple):
    """Row elements [start, stop): whole tensors first..last, or elements from `offset` on of tensor `first`."""

    start: int
    stop: int
    first: int
    last: int
    offset: int | None


class FlatRow:
    """The order in which tensors of one dtype and device are laid out in a row.

    Every tensor is laid out in the memory order its counterpart in `templates` has now (so channels_last tensors are
    read without a copy); complex tensors as pairs of reals. Tensors that change their strides later keep that order.

    Args:
        templates: tensors of equal dtype and device; shapes and strides are remembered, not the tensors.
    """

    def __init__(self, templates: Sequence[Tensor]) -> None:
        self.shapes = [tuple(t.shape) for t in templates]
        self.orders = [_memory_order(t) for t in templates]
        self.ordered_shapes = [
            _ordered(_real(t.detach()), o).shape for t, o in zip(templates, self.orders, strict=True)
        ]
        self.sizes = [_real(t.detach()).numel() for t in templates]
        self.numel = sum(self.sizes)
        self.dtype = _real(templates[0].detach()).dtype
        self.device = templates[0].device
        self.piece = CPU_PIECE if self.device.type == "cpu" else max(self.numel, 1)
        self._spans = _spans(self.sizes, self.piece)
        self._stage: Tensor | None = None

    def ranges(self) -> Iterator[slice]:
        """Ranges of the row of at most `piece` elements, for work that touches rows only."""
        for start in range(0, self.numel, self.piece):
            yield slice(start, min(start + self.piece, self.numel))

    def read(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (range of the row, its values); None stands for zeros. Values are valid until the next piece."""
        flat = [self._flat(tensor, index) for index, tensor in enumerate(tensors)]
        for span in self._spans:
            part = slice(span.start, span.stop)
            if span.offset is not None:
                yield part, flat[span.first][span.offset : span.offset + span.stop - span.start]
            elif span.first == span.last:
                yield part, flat[span.first]
            else:
                yield part, torch.cat(flat[span.first : span.last + 1], out=self._staging(span.stop - span.start))

    def views(self, row: Tensor) -> list[Tensor]:
        """The parts of a row that belong to the tensors, shaped like them in the order of the row."""
        parts = row.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.ordered_shapes, strict=True)]

    def write(self, views: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
        """Copy `views` of a row into the tensors, in place; None is passed over."""
        pairs = [
            (_ordered(_real(tensor.detach()), order), view)
            for tensor, order, view in zip(tensors, self.orders, views, strict=True)
            if tensor is not None
        ]
        if pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])

    def equals(self, views: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> bool:
        """Whether `views` of a row hold the values of the tensors (None stands for zeros)."""
        for tensor, order, view in zip(tensors, self.orders, views, strict=True):
            if tensor is None:
                if bool(view.any()):
                    return False
            elif not torch.equal(_ordered(_real(tensor.detach()), order), view):
                return False
        return True

    def _flat(self, tensor: Tensor | None, index: int) -> Tensor:
        if tensor is None:
            return torch.zeros(self.sizes[index], dtype=self.dtype, device=self.device)
        if self.orders[index] is None and not tensor.is_complex():
            return tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().reshape(-1)
        return _ordered(_real(tensor.detach()), self.orders[index]).reshape(-1)

    def _staging(self, size: int) -> Tensor:
        if self._stage is None:
            self._stage = torch.empty(min(self.piece, self.numel), dtype=self.dtype, device=self.device)
        return self._stage[:size]


def _spans(sizes: Sequence[int], piece: int) -> list[_Span]:
    """Cut the row: runs of small tensors together, large tensors into pieces."""
    spans: list[_Span] = []
    start, first, filled = 0, 0, 0
    for index, size in enumerate(sizes):
        if filled + size > piece and filled:
            spans.append(_Span(start, start + filled, first, index - 1, None))
            start, first, filled = start + filled, index, 0
        if size > piece:
            spans.extend(
                _Span(start + at, start + min(at + piece, size), index, index, at) for at in range(0, size, piece)
            )
            start, first = start + size, index + 1
        else:
            filled += size
    if filled:
        spans.append(_Span(start, start + filled, first, len(sizes) - 1, None))
    return spans


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions by falling stride, or None where that is the order they have (the pair of a complex stays last)."""
    real = _real(tensor.detach())
    strides = real.stride()
    order = tuple(sorted(range(real.dim()), key=lambda d: -strides[d]))
    return None if order == tuple(range(real.dim())) or real.is_contiguous() else order


def _ordered(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return tensor if order is None else tensor.permute(order)
