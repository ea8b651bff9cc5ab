"""Histories filled by hand, and the same pairs as explicit vectors."""

import torch

from aadl import history_layout
from aadl.block import make_block
from aadl.history import Column, History


def make_history(depth=3, size=50, dtype=torch.float64, ring=None, kinds=("parameters",), residuals=True):
    blocks = [make_block(kind, [torch.zeros(size, dtype=dtype)], depth, residuals, ring) for kind in kinds]
    return History(depth, blocks)


def copied_to_the_host(block):
    """The block, as if the tensors were on a device and its rows on the host."""
    block.offloaded, block.stage = True, torch.empty_like(block.mapped)
    return block


def copy_histories_to_the_host(monkeypatch):
    """Accelerators that are made from now on have their rows on the host, as if the tensors were on a device."""
    monkeypatch.setattr(
        history_layout, "make_block", lambda *args, **more: copied_to_the_host(make_block(*args, **more))
    )


def push_pair(history, starts, mapped, macro_step=0, ratio=1.0, **more):
    """Store one pair per block."""
    history.begin([[x] for x in starts])
    history.push([[g] for g in mapped], Column(macro_step, True, 1.0), ratio, **more)


def random_pairs(count, size=50, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, size, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def filled_history(pairs, **arguments):
    """A history of these pairs."""
    history = make_history(**arguments)
    for number, (x, g) in enumerate(pairs):
        push_pair(history, [x], [g], number)
    return history


def explicit(pairs):
    """f_k, g_k, DF and DG of pairs (x_j, g_j), columns oldest first, in float64."""
    x, g = (torch.stack([pair[part] for pair in pairs], dim=1).double() for part in (0, 1))
    f = g - x
    return f[:, -1], g[:, -1], f[:, 1:] - f[:, :-1], g[:, 1:] - g[:, :-1]


def orthogonal_solution(differences, residual):
    """argmin ||residual - differences c||, by a factorization."""
    q, r = torch.linalg.qr(differences)
    return torch.linalg.solve_triangular(r, (q.T @ residual)[:, None], upper=True)[:, 0]
