"""Tells two states of checkpoints apart by all of their bits."""

import hashlib
import json

import torch
from torch import Tensor

from experiments.runs.checkpoint_state import is_sharded


def leaves(state, name):
    """Tensors, plain values and empty containers by name."""
    if isinstance(state, (dict, list, tuple)):
        yield name, type(state)()
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}[{key!r}]")
    else:
        yield name, state


def digest(state):
    """SHA-256 over all names, types, values and bits of a state, in any order of keys; of DTensors the local part."""
    result = hashlib.sha256()
    for name, value in sorted(leaves(state, "state"), key=lambda leaf: leaf[0]):
        if isinstance(value, Tensor):
            local = value.to_local() if is_sharded(value) else value
            plain = local.detach().resolve_conj().resolve_neg().cpu().contiguous()
            result.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
            result.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            result.update(json.dumps([name, type(value).__qualname__, value]).encode())
    return result.hexdigest()
