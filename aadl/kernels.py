"""The arithmetic of the passes over memory, on rows: storing a pair, inner products, the combination.

Each pass exists in torch calls over pieces that stay in cache, and the two that read whole rings also as one function
that torch.compile fuses into a single loop over memory. Both forms compute the same numbers up to the order of sums.

Products are summed in float64, in which products of float32 numbers are exact: a Gram matrix of float32 rows is then
as good as an orthogonal factorization (docs/method.md).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aadl.compilation import run_compiled
from aadl.deferred import handed

WIDE_PIECE = 16_384
"""Elements per row that are widened to float64 at once, so that a depth-10 ring stays in a second-level cache."""
WIDE_PIECE_ACCELERATOR = 1 << 20
HOST_PIECE = 65_536
COMBINE_PIECE = 131_072
SUM_BLOCK = 2048
"""Products of bfloat16 rows summed in float32, so that a sum is wrong by at most 2048 2^-24 = 1.2e-4 of the product of
the norms (3.6e-6 on a CPU without vector instructions), far below the rounding of the rows, 2^-9."""
SHORTEST_ROW = 4096
"""Shorter rows are never compiled."""
MOST_RIGHT_SIDES = 3
"""Of one compiled pass: more of them run out of registers."""


def store(
    value: Tensor,
    start: Tensor,
    residual: Tensor | None,
    mapped: Tensor,
    rows: tuple[Tensor | None, Tensor] | None,
    ratio: float = 1.0,
    kept: Tensor | None = None,
    fused: bool = False,
    origin: Tensor | None = None,
) -> Tensor | None:
    """Make (start, value) the newest pair and write its differences from the last one, for one piece.

        f_new = value - start,  Df = f_new - ratio * f,  Dg = value - (g + (ratio - 1) f),  f <- f_new,  g <- value.

    Args:
        value: the mapped iterate g_new.
        start: x_new; may be `mapped` itself, the last mapped iterate.
        residual: f, overwritten; None where none is kept.
        mapped: g, overwritten.
        rows: where Df (None where none is kept) and Dg go; None for the first pair.
        ratio: of the learning rates of the new and the last pair.
        kept: where the last mapped iterate goes, or None; may be `start`.
        fused: whether to use the compiled kernel where it works.
        origin: where the jump came from that is measured; None to measure nothing.

    Returns:
        ||f_new||^2, ||g_new||^2, ||s||^2 and <f_new, s> with the jump s = start - origin, in float64 on the device,
        shape (4,), made while the piece is in cache; None without `origin`.
    """
    if fused and ratio == 1 and residual is not None and rows is not None and (kept is None or kept is start):
        own_start = None if start is mapped else start
        known = None if origin is mapped else origin
        options = kept is not None, origin is not None
        result = run_compiled(_store, value, own_start, residual, mapped, *rows, known, *options)
        if result is not None:
            return None if origin is None else result
    numbers = None if origin is None else measured(value, start, origin)
    if residual is not None and rows is not None:
        delta_residual, delta_mapped = rows
        assert delta_residual is not None
        # the row of Dg is first the place of f_new, unless that would round it
        new = torch.sub(value, start, out=delta_mapped if delta_mapped.dtype == value.dtype else None)
        torch.sub(new, residual, alpha=ratio, out=delta_residual)
        is_difference = start is mapped and ratio == 1 and new is delta_mapped  # Dg = f_new after a plain step
    elif residual is not None:
        new, is_difference = torch.sub(value, start), True
    else:
        new, is_difference = None, rows is None
    if kept is not None:
        kept.copy_(mapped)
    if residual is not None and new is not None:
        if ratio != 1:
            mapped.add_(residual, alpha=ratio - 1)
        residual.copy_(new)
    if rows is not None and not is_difference:
        torch.sub(value, mapped, out=rows[1])
    mapped.copy_(value)
    return numbers


def measured(value: Tensor, start: Tensor, origin: Tensor) -> Tensor:
    """The numbers that `store` returns with `origin`."""
    if value.device.type == "cpu":
        jumped, totals = start is not origin, [0.0] * 4
        for begin in range(0, value.numel(), HOST_PIECE):
            a, b, c = (row[begin : begin + HOST_PIECE] for row in (value, start, origin))
            numbers = _measured_piece(a, b, c, jumped)
            if value.dtype != torch.float64 and not all(x == 0 or 1e-20 < abs(x) < 1e30 for x in numbers):
                numbers = _measured_piece(a.double(), b.double(), c.double(), jumped)
            totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        return torch.tensor(totals, dtype=torch.float64, device="cpu")
    total = torch.zeros(4, dtype=torch.float64, device=value.device)
    for begin in range(0, value.numel(), WIDE_PIECE_ACCELERATOR):
        part = slice(begin, begin + WIDE_PIECE_ACCELERATOR)
        wide, first, last = value[part].double(), start[part].double(), origin[part].double()
        update, jump = wide - first, first - last
        pairs = ((update, update), (wide, wide), (jump, jump), (update, jump))
        total += torch.stack([torch.dot(a, b) for a, b in pairs])
    return total


def _measured_piece(value: Tensor, start: Tensor, origin: Tensor, jumped: bool) -> list[float]:
    update = value - start
    numbers = [float(torch.dot(update, update)), float(torch.dot(value, value)), 0.0, 0.0]
    if jumped:
        jump = start - origin
        numbers[2:] = float(torch.dot(jump, jump)), float(torch.dot(update, jump))
    return numbers


def _store(
    value: Tensor,
    own_start: Tensor | None,
    residual: Tensor,
    mapped: Tensor,
    delta_residual: Tensor,
    delta_mapped: Tensor,
    origin: Tensor | None,
    keep: bool,
    measure: bool,
) -> Tensor:
    """One loop over memory; `own_start` is None for a start at the mapped iterate, `origin` for a jump from there."""
    start = mapped if own_start is None else own_start
    new = value - start
    numbers = new.new_zeros(4, dtype=torch.float64)
    if measure:
        wide, update = value.double(), new.double()
        squares = [update.square().sum(), wide.square().sum()]
        if own_start is None and origin is None:
            numbers = torch.stack([*squares, *numbers[:2].unbind()])
        else:
            jump = (start - (mapped if origin is None else origin)).double()
            numbers = torch.stack([*squares, jump.square().sum(), (update * jump).sum()])
    delta_residual.copy_(new - residual)
    delta_mapped.copy_(value - mapped)
    if keep and own_start is not None:
        own_start.copy_(mapped)
    residual.copy_(new)
    mapped.copy_(value)
    return numbers


# ---- inner products ------------------------------------------------------------------------------------------------


def inner_products(ring: Tensor, residual: Tensor, filled: int, slots: Sequence[int], fused: bool) -> Tensor:
    """Products of all rows and of f with the rows `slots` and with f, float64, shape (len(slots) + 1, filled + 1).

    Args:
        ring: shape (depth, numel), of which the first `filled` rows are in use (all others are finite).
        residual: f, shape (numel,).
        slots: rows whose products are wanted.
        fused: whether to use the compiled kernel where it works.
    """
    if fused:
        products = _fused_products(ring, residual, slots)
        if products is not None:
            return torch.cat([products[:, :filled], products[:, -1:]], 1)
    numel = residual.numel()
    longest = WIDE_PIECE if residual.device.type == "cpu" else WIDE_PIECE_ACCELERATOR
    wide = work_area(filled + 1, min(longest, max(numel, 1)), residual.device)
    products = torch.zeros(len(slots) + 1, filled + 1, dtype=torch.float64, device=residual.device)
    for start in range(0, numel, longest):
        stop = min(start + longest, numel)
        piece = wide[:, : stop - start]
        piece[:filled].copy_(ring[:filled, start:stop])
        piece[filled].copy_(residual[start:stop])
        for index, slot in enumerate([*slots, filled]):
            products[index].addmv_(piece, piece[slot])
    return products


_local = threading.local()


def work_area(rows: int, length: int, device: torch.device) -> Tensor:
    """A float64 work area that this thread (and stream) keeps between calls."""
    work: dict[Any, Tensor] = _local.__dict__.setdefault("work", {})
    key = rows, length, device, torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    if key not in work:
        if len(work) > 8:
            work.clear()
        work[key] = torch.empty(rows, length, dtype=torch.float64, device=device)
    return work[key]


def free_work_areas() -> None:
    """Free the work areas that `work_area` keeps for this thread."""
    _local.__dict__.clear()


def _fused_products(ring: Tensor, residual: Tensor, slots: Sequence[int]) -> Tensor | None:
    """`inner_products` over all rows of the ring; each pass leaves out rows whose products are known by symmetry."""
    depth = ring.shape[0]
    right = [depth, *slots]  # f first, numbered as if it were a row behind the others
    products = torch.zeros(len(right), depth + 1, dtype=torch.float64, device=ring.device)
    for first in range(0, len(right), MOST_RIGHT_SIDES):
        group = right[first : first + MOST_RIGHT_SIDES]
        rows = [slot for slot in range(depth) if slot not in right[:first]]
        vectors = [residual if slot == depth else ring[slot] for slot in group]
        result = _pass([ring[slot] for slot in rows], vectors)
        if result is None:
            return None
        block = slice(first, first + len(group))
        products[block, rows] = result[:, :-1]
        for index in range(1, first):
            products[block, right[index]] = products[index, group]
        if first == 0:
            products[0, depth] = result[0, -1]
    products[1:, depth] = products[0, list(slots)]
    return products.roll(-1, 0)


def _pass(rows: list[Tensor], right: list[Tensor]) -> Tensor | None:
    """Products of all rows with all right sides, and of the first right side with itself, in one loop over memory.

    Shape (right sides, rows + 1). Products of bfloat16 rows are summed in float32 over blocks and in float64 over the
    sums, good to 1e-6: beyond what such rows resolve, and what a CPU can do at the speed of memory.
    """
    if not rows or rows[0].dtype != torch.bfloat16:
        return run_compiled(_products, rows, right)
    main = right[0].numel() // SUM_BLOCK * SUM_BLOCK

    def blocks(vector: Tensor) -> Tensor:
        return vector[:main].view(-1, SUM_BLOCK)

    sums = run_compiled(_block_products, list(map(blocks, rows)), list(map(blocks, right)))
    if sums is None or main == right[0].numel():
        return sums
    ends = torch.stack([row[main:].double() for row in rows]), torch.stack([v[main:].double() for v in right])
    return sums + torch.cat([ends[1] @ ends[0].T, ends[1][:1].square().sum().expand(len(right), 1)], 1)


def _products(rows: list[Tensor], right: list[Tensor]) -> Tensor:
    """The products of `_pass`, with an accumulator for each."""
    wide = [vector.double() for vector in right]
    sums = [(row.double() * vector).sum() for row in rows for vector in wide]
    square = (wide[0] * wide[0]).sum().expand(len(right))
    return torch.cat([torch.stack(sums).view(len(rows), len(right)).T, square[:, None]], 1)


def _block_products(rows: list[Tensor], right: list[Tensor]) -> Tensor:
    """The products of `_pass`; the vectors are matrices with a block in each row."""
    wide = [vector.float() for vector in right]
    sums = [(row.float() * vector).sum(1).double().sum() for row in rows for vector in wide]
    square = (wide[0] * wide[0]).sum(1).double().sum().expand(len(right))
    return torch.cat([torch.stack(sums).view(len(rows), len(right)).T, square[:, None]], 1)


# ---- combination ---------------------------------------------------------------------------------------------------


def combine(
    out: Tensor,
    base: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    residual: tuple[Tensor, float] | None,
    along: tuple[Tensor, list[Tensor], Tensor] | None,
    fused: bool,
) -> Tensor | None:
    """out = base - sum over terms of ring' coefficients - factor * residual, and how far that goes along an update.

    Args:
        out: shape (numel,), overwritten.
        base: g, shape (numel,).
        terms: pairs of a ring, shape (rows, numel), and its coefficients, float64 of shape (rows,).
        residual: (f, factor), or None.
        along: (f, rows, coefficients s) of the update u = f - sum s_i rows_i, or None.
        fused: whether to use the compiled kernel where it works.

    Returns:
        <out - base, u> as a float64 tensor without dimensions, or None without `along`.
    """
    numbers = [handed(coefficients.to(out.dtype), out.device) for _, coefficients in terms]
    rings = [ring for ring, _ in terms]
    if fused and out.numel():
        vector = None if residual is None else residual[0]
        factor = None
        if residual is not None:
            factor = handed(torch.tensor(residual[1], dtype=out.dtype, device="cpu"), out.device)
        update = None if along is None else (along[0], along[1], handed(along[2].to(out.dtype), out.device))
        result = run_compiled(_combination, out, base, rings, numbers, vector, factor, update)
        if result is not None:
            return result if along is not None else None
    used = [(ring, number[: _length(given)]) for (ring, given), number in zip(terms, numbers, strict=True)]
    return _combine_pieces(out, base, used, residual, along)


def _length(coefficients: Tensor) -> int:
    """Number of coefficients up to the last one that is not zero, at least 1."""
    nonzero = coefficients.nonzero()
    return int(nonzero[-1]) + 1 if len(nonzero) else 1


def _combine_pieces(
    out: Tensor,
    base: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    residual: tuple[Tensor, float] | None,
    along: tuple[Tensor, list[Tensor], Tensor] | None,
) -> Tensor | None:
    numel = out.numel()
    longest = max(numel, 1) if out.device.type != "cpu" or numel <= 2 * COMBINE_PIECE else COMBINE_PIECE
    if out.device.type != "cpu" and any(ring.dtype != out.dtype for ring, _ in terms):
        longest = WIDE_PIECE_ACCELERATOR  # rows are widened piece by piece
    advance = torch.zeros((), dtype=torch.float64, device=out.device)
    mean = [] if along is None else along[2].tolist()
    for start in range(0, numel, longest):
        part = slice(start, min(start + longest, numel))
        target, source = out[part], base[part]
        for ring, coefficients in terms:
            rows = ring[: coefficients.numel(), part]
            rows = rows if rows.dtype == target.dtype else rows.to(target.dtype)
            torch.addmv(source, rows.T, coefficients, alpha=-1, out=target)
            source = target
        if residual is not None:
            target.sub_(residual[0][part], alpha=residual[1])
        if along is not None:
            update = along[0][part]
            for row, number in zip(along[1], mean, strict=True):
                update = torch.sub(update, row[part].to(update.dtype), alpha=number)
            advance += torch.dot(target - base[part], update)
    return advance if along is not None else None


def _combination(
    out: Tensor,
    base: Tensor,
    rings: list[Tensor],
    numbers: list[Tensor],
    vector: Tensor | None,
    factor: Tensor | None,
    update: tuple[Tensor, list[Tensor], Tensor] | None,
) -> Tensor:
    """`combine` as one loop over memory, for torch.compile."""
    correction = torch.zeros_like(base) if vector is None or factor is None else factor * vector
    for ring, coefficients in zip(rings, numbers, strict=True):
        for row, number in zip(ring.unbind(0), coefficients.unbind(0), strict=True):
            correction = correction + number * row.to(base.dtype)
    out.copy_(base - correction)
    if update is None:
        return correction.new_zeros((), dtype=torch.float64)
    direction, rows, mean = update
    for row, number in zip(rows, mean.unbind(0), strict=True):
        direction = direction - number * row.to(base.dtype)
    return -(correction.double() * direction.double()).sum()
