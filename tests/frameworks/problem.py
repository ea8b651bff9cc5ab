"""The training that all frameworks run: linear regression whose ten batches a steady macro-step goes through.

Its targets can be met exactly, so that the residual of a macro-step of ten steps falls to nothing, and its condition
number makes plain SGD slow: candidates are accepted and pay.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NUM_SAMPLES = 40
BATCH_SIZE = 4
STEPS_PER_EPOCH = NUM_SAMPLES // BATCH_SIZE
FIRST_ATTEMPT = 20
"""Optimizer steps whose losses and weights before them are those without acceleration, at the defaults."""
LEARNING_RATE = 0.08


def framework(name):
    """The package of a framework; the module that asks for it is skipped, and says why, where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import itself, which are not ours to mend
        reason = f"{name.split('.')[0]} is not installed: pip install -r tests/frameworks/requirements.txt"
        return pytest.importorskip(name, reason=reason)


def data():
    """Inputs of 40 samples with 8 features of falling size, and targets."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(NUM_SAMPLES, 8, generator=generator) * torch.logspace(0, -1, 8)
    return inputs, (inputs @ torch.arange(1.0, 9.0)).unsqueeze(1) + 1


def dataset():
    return TensorDataset(*data())


def loader():
    """Ten batches in the same order in every epoch."""
    return DataLoader(dataset(), batch_size=BATCH_SIZE)


def network():
    torch.manual_seed(0)
    return nn.Linear(8, 1)


def weights_of(module):
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def loss_of(module):
    """Mean squared error on all samples."""
    inputs, targets = data()
    with torch.no_grad():
        return float(nn.functional.mse_loss(module(inputs), targets))
