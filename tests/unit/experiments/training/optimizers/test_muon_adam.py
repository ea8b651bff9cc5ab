"""Muon for the matrices beside Adam for the other parameters."""

import copy
import math
import pickle

import pytest
import torch
from small_runs import closure_of, identical, snapshot, train
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments.training.optimizers import MuonAdam

MUON = {"lr": 3e-2, "momentum": 0.9}
ADAM = {"lr": 7e-3, "betas": (0.8, 0.99)}
BOTH = {"lr": 3e-2, "adam_lr": 7e-3, "momentum": 0.9, "betas": (0.8, 0.99)}


def deep():
    """Weights (6, 3) and (4, 6) for Muon; a column, a row and the biases for Adam."""
    torch.manual_seed(1)
    sizes = [(3, 6), (6, 4), (4, 1), (1, 2), (2, 1)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def weights_of(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def test_it_is_muon_for_matrices_and_adam_for_the_rest_and_a_scheduler_multiplies_both_rates():
    model = deep()
    twin, start = copy.deepcopy(model), weights_of(model)
    optimizer = MuonAdam(model.parameters(), **BOTH)
    matrices = [p for p in twin.parameters() if p.ndim == 2 and 1 not in p.shape]
    others = [p for p in twin.parameters() if p.ndim == 1 or 1 in p.shape]
    assert [tuple(p.shape) for p in matrices] == [(6, 3), (4, 6)] and len(others) == 8
    parts = [torch.optim.Muon(matrices, weight_decay=0.0, **MUON), torch.optim.Adam(others, **ADAM)]
    schedulers = [CosineAnnealingLR(part, 9) for part in (optimizer, *parts)]
    for _ in range(8):
        loss = closure_of(model, optimizer)()
        optimizer.step()
        twin.zero_grad()
        assert float(closure_of(twin, parts[0])().detach()) == float(loss.detach())
        for part in parts:
            part.step()
        for scheduler in schedulers:
            scheduler.step()
        assert identical(dict(model.state_dict()), dict(twin.state_dict()))
        assert [group["lr"] for group in optimizer.param_groups] == [part.param_groups[0]["lr"] for part in parts]
    assert ((weights_of(model) - start).abs() > 1e-6).all()


def test_a_rate_in_the_group_is_the_rate_of_the_step():
    model = deep()
    optimizer = MuonAdam(model.parameters(), **BOTH)
    train(model, optimizer, 2)
    for still, moving in ((0, 1), (1, 0)):
        optimizer.param_groups[still]["lr"], optimizer.param_groups[moving]["lr"] = 0.0, 1e-2
        before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        train(model, optimizer, 1)
        same = [
            all(torch.equal(p, old) for p, old in zip(group["params"], values, strict=True))
            for group, values in zip(optimizer.param_groups, before, strict=True)
        ]
        assert same[still] and not same[moving]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_stands_on_its_own(copied):
    model = deep()
    optimizer = MuonAdam(model.parameters(), **BOTH)
    train(model, optimizer, 5)
    other, twin = copied((model, optimizer))
    kept = snapshot(model, optimizer)
    losses = train(other, twin, 5)
    assert identical(snapshot(model, optimizer), kept)  # left alone by its copy
    assert losses == train(model, optimizer, 5)
    assert identical(snapshot(model, optimizer), snapshot(other, twin))


def test_groups_are_refused():
    model = deep()
    for params in ([{"params": list(model.parameters())}], model.named_parameters()):
        with pytest.raises(ValueError, match=r"params must be parameters, not groups of them"):
            MuonAdam(params)
    with pytest.raises(ValueError, match=r"empty parameter list"):
        MuonAdam([])


@pytest.mark.parametrize("kind", ["matrices", "vectors"])
def test_one_kind_of_parameters_needs_one_part(kind):
    shapes = {"matrices": [(3, 4), (2, 2)], "vectors": [(5,), (1, 4), (4, 1), (2, 2, 2)]}[kind]
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, math.prod(s)).reshape(s)) for s in shapes] for _ in range(2))
    optimizer = MuonAdam(ours, **BOTH)
    if kind == "matrices":
        reference = torch.optim.Muon(theirs, weight_decay=0.0, **MUON)
    else:
        reference = torch.optim.Adam(theirs, **ADAM)
    assert len(optimizer.param_groups) == 1
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
