"""Lists of tensors seen as one contiguous row, read and written in pieces that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CPU_PIECE = 65_536
"""Elements per piece of a long row on a CPU: a few float32 pieces fit into a core's second-level cache."""
SHORT_ROW = 4 * CPU_PIECE
"""Rows up to this length are one piece: calls cost more than the cache saves."""
SAMPLE = 64
"""Leading elements per tensor that `FlatRow.sample` looks at."""


class _Span(NamedTuple):
    """Row elements [start, stop): whole tensors first..last, or elements from `offset` on of tensor `first`."""

    start: int
    stop: int
    first: int
    last: int
    offset: int | None


class _Views(NamedTuple):
    """The memory of tensors, seen in the order of the row."""

    tensors: Sequence[Tensor | None]
    places: list[tuple[int, tuple[int, ...]] | None]
    """Address and strides of each."""
    ordered: list[Tensor | None]
    flat: list[Tensor | None]
    """The elements inside the window; None where they do not lie in one piece of memory in this order."""
    heads: list[Tensor] | None
    """Of `flat`, where that is complete."""


class FlatRow:
    """The order in which tensors of one dtype and device are laid out in a row.

    Every tensor is laid out in the memory order its counterpart in `templates` has now (so channels_last tensors are
    read without a copy); complex tensors as pairs of reals. Tensors that change their strides later keep that order.

    Args:
        templates: tensors of equal dtype and device; shapes and strides are remembered, not the tensors.
        part: (index, count): the row is the index-th of `count` equal windows [lo, hi) of the tensors laid end to end,
            the last one shorter or empty. `read` yields the window only; `views` and `write` deal with whole rows.
        cut: whether large tensors are read in pieces.
    """

    def __init__(self, templates: Sequence[Tensor], part: tuple[int, int] = (0, 1), cut: bool = True) -> None:
        self.shapes = [tuple(t.shape) for t in templates]
        self.orders = [_memory_order(t) for t in templates]
        self.ordered_shapes = [
            _ordered(_real(t.detach()), o).shape for t, o in zip(templates, self.orders, strict=True)
        ]
        self.whole_sizes = [_real(t.detach()).numel() for t in templates]
        self.whole = sum(self.whole_sizes)
        index, count = part
        self.is_window = count > 1
        self.window_length = -(-self.whole // count)
        bounds = [min(i * self.window_length, self.whole) for i in (index, index + 1)]
        self.window = slice(*bounds)
        self.numel = self.window.stop - self.window.start
        self.dtype = _real(templates[0].detach()).dtype
        self.device = templates[0].device
        short = self.device.type != "cpu" or self.numel <= SHORT_ROW
        self.piece = max(self.numel, 1) if short else CPU_PIECE
        ends = [0]
        for size in self.whole_sizes:
            ends.append(ends[-1] + size)
        clipped = [min(max(end, self.window.start), self.window.stop) for end in ends]
        self._inside = [slice(clipped[i] - ends[i], clipped[i + 1] - ends[i]) for i in range(len(self.whole_sizes))]
        self._spans = _spans([inside.stop - inside.start for inside in self._inside], self.piece, cut)
        self._views: _Views | None = None
        self._stage: Tensor | None = None

    def ranges(self, piece: int | None = None) -> Iterator[slice]:
        """Ranges of the row of at most `piece` elements, for work that touches rows only."""
        length = piece or self.piece
        for start in range(0, self.numel, length):
            yield slice(start, min(start + length, self.numel))

    def read(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (range of the row, values) in pieces; None stands for zeros. Values are valid until the next piece."""
        flat = self._flat(tensors)
        for span in self._spans:
            part = slice(span.start, span.stop)
            if span.offset is not None:
                yield part, flat[span.first][span.offset : span.offset + span.stop - span.start]
            elif span.first == span.last:
                yield part, flat[span.first]
            else:
                yield part, torch.cat(flat[span.first : span.last + 1], out=self._staging(span.stop - span.start))

    def sample(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The leading elements of every tensor: enough to notice that somebody restored or averaged them."""
        heads = self._seen(tensors).heads
        return torch.cat(heads if heads is not None else [flat[:SAMPLE] for flat in self._flat(tensors)])

    def views(self, row: Tensor) -> list[Tensor]:
        """The parts of a whole row that belong to the tensors, shaped like them in the order of the row."""
        parts = torch.split(row, self.whole_sizes)
        return [part.view(shape) for part, shape in zip(parts, self.ordered_shapes, strict=True)]

    def logical_views(self, rows: Tensor) -> list[Tensor]:
        """Parts of whole rows, shape (..., whole), shaped like the tensors themselves; complex ones as pairs."""
        lead = rows.shape[:-1]
        parts = torch.split(rows, self.whole_sizes, -1)
        result = []
        for part, shape, order in zip(parts, self.ordered_shapes, self.orders, strict=True):
            view = part.view((*lead, *shape))
            if order is not None:
                inverse = sorted(range(len(order)), key=order.__getitem__)
                view = view.permute(*range(len(lead)), *(len(lead) + i for i in inverse))
            result.append(view)
        return result

    def write(self, views: Sequence[Tensor], tensors: Sequence[Tensor | None], non_blocking: bool = False) -> None:
        """Copy `views` of a whole row into the tensors, in place; None is left out."""
        ordered = self._seen(tensors).ordered
        pairs = [(target, view) for target, view in zip(ordered, views, strict=True) if target is not None]
        if pairs:
            targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
            torch._foreach_copy_(targets, sources, non_blocking)

    def _flat(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The elements of each tensor inside the window, in the order of the row."""
        views = self._seen(tensors)
        return [
            flat if flat is not None else self._copied(ordered, inside)
            for flat, ordered, inside in zip(views.flat, views.ordered, self._inside, strict=True)
        ]

    def _copied(self, ordered: Tensor | None, inside: slice) -> Tensor:
        if ordered is None:
            return torch.zeros(inside.stop - inside.start, dtype=self.dtype, device=self.device)
        return ordered.reshape(-1)[inside]

    def _seen(self, tensors: Sequence[Tensor | None]) -> _Views:
        """Views of the tensors, cached for this list: making views costs more than the passes over short vectors."""
        places = [None if tensor is None else (tensor.data_ptr(), tensor.stride()) for tensor in tensors]
        known = self._views
        if known is not None and known.tensors is tensors and known.places == places:
            return known
        ordered: list[Tensor | None] = []
        flat: list[Tensor | None] = []
        for tensor, order, inside in zip(tensors, self.orders, self._inside, strict=True):
            seen = None if tensor is None else _ordered(_real(tensor.detach()), order)
            ordered.append(seen)
            row = None if seen is None else seen.reshape(-1)
            shared = row is not None and seen is not None and row.data_ptr() == seen.data_ptr()
            flat.append(row[inside] if row is not None and shared else None)
        complete = [part for part in flat if part is not None]
        heads = [part[:SAMPLE] for part in complete] if len(complete) == len(flat) else None
        self._views = _Views(tensors, places, ordered, flat, heads)
        return self._views

    def _staging(self, size: int) -> Tensor:
        if self._stage is None:
            self._stage = torch.empty(min(self.piece, self.numel), dtype=self.dtype, device=self.device)
        return self._stage[:size]


def _spans(sizes: Sequence[int], piece: int, cut: bool) -> list[_Span]:
    """Cut the row: small tensors are joined, large ones are cut into pieces or, without `cut`, stand alone."""
    spans: list[_Span] = []
    start, first, filled = 0, 0, 0
    for index, size in enumerate(sizes):
        if filled + size > piece and filled:
            spans.append(_Span(start, start + filled, first, index - 1, None))
            start, first, filled = start + filled, index, 0
        if size > piece and not cut:
            spans.append(_Span(start, start + size, index, index, None))
            start, first = start + size, index + 1
        elif size > piece:
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
    """Dimensions by falling stride, or None if they are in this order (the pair of a complex number stays last)."""
    real = _real(tensor.detach())
    strides = real.stride()
    order = tuple(sorted(range(real.dim()), key=lambda d: -strides[d]))
    return None if order == tuple(range(real.dim())) or real.is_contiguous() else order


def _ordered(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return tensor if order is None else tensor.permute(order)
