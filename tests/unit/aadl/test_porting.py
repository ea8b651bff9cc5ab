"""Scripts of the published package run with `import aadl as AADL`; one sentence says what has no effect."""

import inspect
import math
import re
import warnings

import pytest
import torch
from paths import ROOT
from small_runs import EAGER, identical, network, sgd, squared_error, statistics, train

import aadl
import aadl as AADL
from aadl import porting

PAGE = ROOT / "docs" / "porting.md"
LEADING = ("anderson", 0.5, 1, 5, 2, 4, 1e-8, False)


def guarded_closure(model, optimizer):
    """Closures of the published package ask whether gradients are wanted; here they always are."""

    def closure():
        if torch.is_grad_enabled():
            optimizer.zero_grad()
        loss = squared_error(model)
        if loss.requires_grad:
            loss.backward()
        return loss

    return closure


def test_a_script_of_many_ranks_with_safeguard_and_closure_runs():
    """By name, with arguments that mean nothing here; the closure is guarded as that package wants it."""
    model = network()
    optimizer = sgd(model, momentum=0.5)
    with pytest.warns(UserWarning, match=r"without effect in aadl: vote_threshold=0\.9 \(with local_sgd more"):
        AADL.distributed_accelerate(
            optimizer,
            acceleration_type="anderson_normal_equation",
            relaxation=1.0,
            wait_iterations=2,
            history_depth=4,
            store_each_nth=1,
            frequency=2,
            sync_frequency=1,
            reg_acc=1e-8,
            average=False,
            safeguard=True,
            vote_threshold=0.9,
        )
    closure = guarded_closure(model, optimizer)
    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    counts = statistics(optimizer)
    assert losses[-1] < losses[0] and counts["accepted"] > 0 and counts["closure_evaluations"] > 0
    assert "closure" not in counts["rejected"]
    assert AADL.reset_acceleration_history(optimizer) is optimizer
    assert AADL.remove_acceleration(optimizer) is optimizer
    assert AADL.remove_acceleration(optimizer) is optimizer


@pytest.mark.parametrize(
    ("further", "name", "value"),
    [
        ((True,), "safeguard", True),
        ((False,), "safeguard", False),
        (("cpu",), "history_device", "cpu"),
        ((None, "cuda:0"), "history_device", None),
        ((torch.device("cpu"), torch.device("cuda", 1), None, True, 0.0, 0), "history_device", "cpu"),
    ],
)
def test_what_follows_average_by_position_has_its_published_meaning(further, name, value):
    optimizer = aadl.accelerate(sgd(network()), *LEADING, *further)
    assert getattr(aadl.accelerator_of(optimizer).settings, name) == value


SAME = {
    "compute_device": ["cpu", "cuda", "cuda:1", torch.device("cuda")],
    "mixing_dtype": [None, "float64", torch.float64],
    "equilibrate": [True],
    "filter_condition": [0, 0.0],
    "refinement_steps": [0],
    "distributed": [True, False],
    "sync_frequency": [1],
    "debug": [False],
    "sketch_fraction": [1, 1.0],
    "sketch_policy": ["adaptive"],
    "sketch_max_retries": [None, 3],
}
OTHER = {
    "compute_device": "mps",
    "mixing_dtype": torch.float32,
    "equilibrate": False,
    "filter_condition": 1e6,
    "refinement_steps": 2,
    "sync_frequency": 4,
    "vote_threshold": 0.5,
    "debug": True,
    "sketch_fraction": 0.1,
}


def test_every_published_argument_has_values_here():
    assert porting.WITHOUT_EFFECT.keys() == {n for n in SAME.keys() | OTHER.keys() if not n.startswith("sketch_")}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SAME.items() for value in values])
def test_arguments_that_ask_for_what_happens_anyway_give_no_warning(name, value):
    aadl.accelerate(sgd(network()), **{name: value})


@pytest.mark.parametrize("name", OTHER)
def test_what_has_no_effect_is_named_in_one_warning_and_the_script_runs(name):
    ends = []
    for more in ({}, {name: OTHER[name]}):
        model = network()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = aadl.accelerate(sgd(model), **EAGER, **more)
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == len(more)
        assert all(text.startswith(f"arguments without effect in aadl: {name}={OTHER[name]!r} (") for text in texts)
        assert all(warning.filename == __file__ for warning in caught)
        train(model, optimizer, 8)
        ends.append(model.state_dict())
    assert identical(*ends)


def test_a_warning_that_is_an_error_leaves_nothing_attached():
    optimizer = sgd(network())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="without effect"):
            aadl.accelerate(optimizer, sketch_fraction=0.5)
    with pytest.raises(ValueError, match="is not accelerated"):
        aadl.accelerator_of(optimizer)


@pytest.mark.parametrize(
    ("further", "named", "message"),
    [
        ((), {"saveguard": True}, "unexpected keyword argument 'saveguard'"),
        ((True,), {"safeguard": False}, "multiple values for argument 'safeguard'"),
        (("cpu",), {"history_device": "cpu"}, "multiple values for argument 'history_device'"),
        (("cpu", "cpu"), {"compute_device": "cpu"}, "multiple values for argument 'compute_device'"),
        (("cpu",) * 7, {}, "at most 15 positional arguments, got 16"),
    ],
)
def test_arguments_that_neither_package_has_are_an_error(further, named, message):
    optimizer = sgd(network())
    with pytest.raises(TypeError, match=re.escape(message)):
        aadl.accelerate(optimizer, *LEADING, *further, **named)
    aadl.accelerate(optimizer)  # nothing was attached


def test_the_page_names_every_published_argument_and_function():
    text = PAGE.read_text()
    named = {name for name in inspect.signature(aadl.accelerate).parameters if not name.startswith("published")}
    assert all(f"`{name}`" in text for name in porting.WITHOUT_EFFECT)
    assert all(f"`{name}`" in text for name in ("remove_acceleration", "reset_acceleration_history", "sketch_..."))
    meant = set(re.findall(r"`(\w+)=", text.partition("## Defaults")[0]))
    assert meant <= named | porting.WITHOUT_EFFECT.keys() | {"averager", "policy"}
    assert math.isclose(inspect.signature(aadl.accelerate).parameters["relaxation"].default, 1.0)
