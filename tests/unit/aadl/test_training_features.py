"""Gradient accumulation, activation checkpointing, shared tensors and torch.compile give the runs they gave before.

Compiled models and steps with the same counts of compilations: tests/unit/aadl/test_accelerator.py.
"""

import pytest
import torch
from parallel_runs import LOSS, RESIDUAL, run
from small_runs import identical
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """The first layers are computed again in the backward pass; the dropout must draw the same numbers then."""

    def __init__(self, again):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.05))
        self.last = nn.Linear(8, 1)
        self.again, self.forwards = again, 0

    def forward(self, inputs):
        self.forwards += 1
        hidden = checkpoint(self.first, inputs, use_reentrant=False) if self.again else self.first(inputs)
        return self.last(hidden)


def checkpointed_run(again, settings):
    models = []

    def build():
        torch.manual_seed(1)
        models.append(Checkpointed(again).double())
        return models[-1]

    torch.manual_seed(2)
    outcome = run(0, 1, settings, build=build, closure=True, steps=50)
    return outcome, models[0]


@pytest.mark.parametrize("settings", [LOSS, RESIDUAL], ids=["loss", "residual"])
def test_activation_checkpointing_changes_nothing(settings):
    (ours, model), (expected, plain) = checkpointed_run(True, settings), checkpointed_run(False, settings)
    assert torch.equal(ours["weights"], expected["weights"])
    assert identical(ours["statistics"], expected["statistics"])
    assert ours["statistics"]["attempts"] > 0
    assert (ours["statistics"]["closure_evaluations"] > 0) == (settings is LOSS)
    assert model.forwards == plain.forwards == 50 + ours["statistics"]["closure_evaluations"]
    counts = [int(one.first[1].num_batches_tracked) for one in (model, plain)]
    assert counts == [100, 50]  # torch runs the layers twice a step; trials leave no trace
    assert settings is LOSS or ours["statistics"]["accepted"] > 0
    other, _ = checkpointed_run(True, None)
    assert settings is LOSS or not torch.equal(other["weights"], ours["weights"])
