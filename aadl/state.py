"""The vectors of a history as named tensors, for checkpoints.

Parameters keep their shapes: the rows of a parameter are tensors of shape (depth, *shape), DTensors sharded as the
parameter is, so that torch.distributed.checkpoint can load them at another world size. A sharded history of replicas
has no shapes to keep; its rows are DTensors of shape (depth, elements), cut along their elements. Whole tensors in
place of DTensors load as well: every rank takes its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aadl.history import Column, History
from aadl.ranks import is_sharded, like, local, sharded_row


def rows_of(history: History, groups: Sequence[Sequence[tuple[int, Tensor]]], flat: bool) -> dict[str, Tensor]:
    """Views of all vectors; nothing is copied.

    Args:
        history: its blocks of parameters and, if any, of momentum, each in the order of `groups`.
        groups: (position among all trainable parameters, parameter) of each block.
        flat: whether rows are saved as they are, for a sharded history, rather than by parameter.
    """
    rows: dict[str, Tensor] = {}
    for number, block in enumerate(history.blocks):
        group = groups[number % len(groups)]
        for name, tensor in block.tensors.items():
            leading = tensor.dim() - 1
            if flat:
                row = sharded_row(tensor, block.row.whole, history.ranks) if block.is_window else tensor
                rows[f"{block.kind}.row{number % len(groups)}.{name}"] = row
                continue
            for (position, parameter), view in zip(group, block.row.logical_views(tensor), strict=True):
                rows[f"{block.kind}.{position}.{name}"] = like(parameter, view, leading)
    return rows


def check_rows(saved: dict[str, Tensor], wanted: dict[str, Tensor], depth: int | None = None) -> None:
    """Raise ValueError unless every wanted tensor is there in its shape and layout.

    Args:
        depth: of the saved rings; None for that of the wanted ones.
    """
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())[0]
        raise ValueError(
            f"the saved history belongs to other parameters, or another layout of ranks: it has {len(saved)} tensors "
            f"and this accelerator {len(wanted)}, {odd!r} only one of them"
        )
    for name, target in wanted.items():
        lead = () if depth is None or not _is_ring(name) else (depth,)
        shape = (*lead, *target.shape[len(lead) :])
        if tuple(saved[name].shape) != shape:
            raise ValueError(
                f"the saved history belongs to parameters of other shapes: {name} has shape "
                f"{tuple(saved[name].shape)}, not {shape}"
            )
        is_for_others = is_sharded(saved[name]) and not is_sharded(target)
        if is_for_others or _part_here(saved[name], target).shape[len(lead) :] != local(target).shape[len(lead) :]:
            raise ValueError(
                f"the saved {name} is sharded in another way than this accelerator's: load it with "
                f"torch.distributed.checkpoint"
            )


@torch.no_grad()
def load_rows(saved: dict[str, Tensor], wanted: dict[str, Tensor], slots: list[int] | None = None) -> None:
    """Copy saved tensors into the views of a history, unless they are in place already.

    Args:
        slots: which rows of a ring to take, from `slots_kept`; None for all, in their places.
    """
    for name, target in wanted.items():
        source, there = _part_here(saved[name], target), local(target)
        if slots is not None and _is_ring(name):
            for slot, kept in enumerate(slots):
                there[slot].copy_(source[kept])
        elif source.data_ptr() != there.data_ptr() or source.device != there.device:
            there.copy_(source)


def _is_ring(name: str) -> bool:
    return name.endswith((".delta_mapped", ".delta_residual"))


def _part_here(saved: Tensor, target: Tensor) -> Tensor:
    """The part of a saved tensor for this rank: a view, cut like the target if the saved tensor is whole.

    Strided shards are not cut, and have another shape than the part.
    """
    if is_sharded(saved) or not is_sharded(target):
        return local(saved)
    part, mesh = saved, target.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(target.placements):  # type: ignore[attr-defined]
        if hasattr(placement, "dim") and not hasattr(placement, "split_factor"):
            pieces, place = part.chunk(mesh.size(dimension), placement.dim), mesh.get_local_rank(dimension)
            part = pieces[place] if place < len(pieces) else part.narrow(placement.dim, 0, 0)
    return part


def plain_state_of(history: History) -> dict[str, Any]:
    """What a history knows besides its vectors, as plain values; every slot keeps its place."""
    return {
        "columns": [
            [c.macro_step, c.consecutive, c.learning_rate, c.jump, c.earlier_rate, c.moved, c.written, c.warm_up]
            for c in history.columns
        ],
        "has_pair": history.has_pair,
        "next": history.next,
        "stale": list(history.stale),
        "grams": history.grams,
        "starts_at_mapped": bool(history.blocks) and history.blocks[0].start is history.blocks[0].mapped,
    }


def parsed_plain_state(saved: dict[str, Any]) -> dict[str, Any]:
    """The fields of a history from its saved plain values.

    Raises:
        KeyError, TypeError, ValueError: the values are damaged.
    """
    grams = {kind: [[float(value) for value in row] for row in rows] for kind, rows in saved["grams"].items()}
    return {
        "columns": [
            Column(int(m), bool(c), float(r), dict(jump), float(e), *more)  # older states have no more
            for m, c, r, jump, e, *more in saved["columns"]
        ],
        "has_pair": bool(saved["has_pair"]),
        "next": int(saved["next"]),
        "stale": [int(slot) for slot in saved["stale"]],
        "grams": grams,
    }


def slots_kept(fields: dict[str, Any], saved_depth: int, depth: int) -> list[int]:
    """The saved slots of the newest columns that fit into `depth` >= 1 rows, oldest first; `fields` change to match.

    These rows lie from the first one on then, and all their products are computed once more.
    """
    kept = fields["columns"][-depth:]
    slots = [(fields["next"] - len(kept) + i) % saved_depth for i in range(len(kept))]
    fields |= {"columns": kept, "next": len(kept) % depth, "stale": list(range(len(kept))), "grams": {}}
    return slots


def restore_plain_state(history: History, fields: dict[str, Any], starts_at_mapped: bool) -> None:
    """Continue where the saved history was."""
    for name, value in fields.items():
        setattr(history, name, value)
    for block in history.blocks:
        block.start = block.mapped if starts_at_mapped else block.own_start
