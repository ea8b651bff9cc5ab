"""Arguments of `aadl.accelerate`: each one out of its range is refused by name, value and range."""

import ast
import copy
import inspect
import math
import re

import numpy as np
import pytest
import torch
from paths import ROOT
from small_runs import EAGER, identical, network, train

import aadl
from aadl.smoothing import DEFAULT_WINDOW

POSITIONAL = [
    "acceleration_type",
    "relaxation",
    "wait_iterations",
    "history_depth",
    "store_each_nth",
    "frequency",
    "reg_acc",
    "average",
]
NAN, INF = math.nan, math.inf
COUNTS = {"wait_iterations": 0, "history_depth": 0, "store_each_nth": 1, "frequency": 1, "average_window": 2}
BAD = {
    "acceleration_type": ["Andersson", "", None, 1],
    "relaxation": [0, -0.5, 1.0001, NAN, INF, -INF, True, "1", None, torch.tensor(1.0), np.float32(NAN), 1j],
    "reg_acc": [-1e-9, NAN, INF, True, "0"],
    "average": ["never", 1, 0, "True", NAN, np.True_, []],
    "safeguard": ["losses", 1, 0, None, np.False_, {}],
    "average_tolerance": [0, -1, NAN, False, "0.7", None],
    "state_coupling": ["none", None, True, 2],
    "history_dtype": [torch.float16, torch.int32, torch.complex64, "float32", np.float32, 32],
    "shard_history": [1, None, "no", np.True_],
    "history_device": ["cuda", "CPU", torch.device("cuda", 0), True, 0, ""],
    "fused": [None, "auto", 1, 0, np.True_],
    "local_sgd": [1, None, "no", np.False_],
    "process_group": [1, "gloo", object()],
    "residuals": [1, "r", len],
    "check": [1, "r", len],
    "momentum": ["zero", "keep", "none", None, True],
} | {
    name: [least - 1, -5, True, False, float(least), NAN, INF, "3", [3], np.float64(least), np.int64(least - 1)]
    for name, least in COUNTS.items()
}
RANGES = {
    "acceleration_type": "'anderson', 'anderson_normal_equation', 'identity', 'nonlinear_gmres'",
    "relaxation": "a number in (0, 1]",
    "reg_acc": "a number >= 0 and finite",
    "average": "False, True, 'auto', 'always'",
    "safeguard": "True, False, 'loss', 'residual'",
    "average_tolerance": "a number > 0",
    "state_coupling": "'params', 'combine', 'full'",
    "history_dtype": "None, torch.float32, torch.float64, torch.bfloat16",
    "shard_history": "one of True, False",
    "history_device": "None, 'cpu' or the device of the parameters (cpu)",
    "fused": "one of True, False",
    "local_sgd": "one of True, False",
    "process_group": "None or a torch.distributed.ProcessGroup",
    "residuals": "None with acceleration_type='anderson'",
    "check": "None with acceleration_type='anderson'",
    "momentum": "'auto'",
} | {name: f"an integer >= {least}" for name, least in COUNTS.items()}
GOOD = {
    "acceleration_type": ["anderson", "anderson_normal_equation", "identity", "Anderson", "IDENTITY"],
    "relaxation": [1, 1e-6, 0.5, np.float32(0.5), np.float64(1)],
    "reg_acc": [0, 0.0, 1e3, np.float32(1e-8)],
    "average": [False, True, "auto", "always", None],
    "safeguard": [True, False, "loss", "residual"],
    "average_tolerance": [1e-9, 5, INF, np.float32(1)],
    "state_coupling": ["params", "combine", "full"],
    "history_dtype": [None, torch.float32, torch.float64, torch.bfloat16],
    "shard_history": [False, True],
    "history_device": [None, "cpu", torch.device("cpu")],
    "fused": [True, False],
    "local_sgd": [False, True],
    "process_group": [None],
    "residuals": [None],
    "check": [None],
    "momentum": ["auto"],
} | {name: [least, least + 7, np.int64(least), np.uint8(least)] for name, least in COUNTS.items()}


def cases(table):
    """One case a value, named without the address of an object: processes that share tests compare the names."""
    cells = [(name, place, value) for name, values in table.items() for place, value in enumerate(values)]
    texts = [f"value {place}" if " at 0x" in repr(value) else repr(value) for _, place, value in cells]
    return [pytest.param(name, value, id=f"{name}={text}") for (name, _, value), text in zip(cells, texts, strict=True)]


def sgd(**settings):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    return aadl.accelerate(optimizer, **settings)


def test_the_nine_positional_arguments_stand_in_the_published_order():
    parameters = inspect.signature(aadl.accelerate).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    positional = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["optimizer", *POSITIONAL]
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    assert aadl.accelerate(optimizer, "anderson", 0.5, 3, 4, 5, 6, 1e-7, "always") is optimizer
    settings = aadl.accelerator_of(optimizer).settings
    got = [getattr(settings, "regularization" if name == "reg_acc" else name) for name in POSITIONAL]
    assert got == ["anderson", 0.5, 3, 4, 5, 6, 1e-7, "always"]


def test_the_page_of_the_arguments_has_their_defaults():
    page = (ROOT / "docs" / "arguments.md").read_text("utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, flags=re.MULTILINE))
    parameters = inspect.signature(aadl.accelerate).parameters
    settings = vars(aadl.accelerator_of(sgd()).settings)  # None in the signature stands for these
    settings = {**settings, "reg_acc": settings["regularization"], "average": True, "average_window": DEFAULT_WINDOW}
    assert shown.keys() == parameters.keys() - {"optimizer", "published", "published_by_name"}
    for name, text in shown.items():
        default = parameters[name].default
        default = settings.get(name) if default is None else default
        if not re.match(r"`|\d", text):  # in words
            assert default is None
        else:
            assert ast.literal_eval(text.strip("`")) == default, name


def test_every_argument_has_good_and_bad_values_here():
    names = set(inspect.signature(aadl.accelerate).parameters) - {"optimizer", "published", "published_by_name"}
    assert names == BAD.keys() == RANGES.keys() == GOOD.keys()


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_value_is_refused_by_name_value_and_range(name, value):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError) as caught:
        aadl.accelerate(optimizer, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert RANGES[name] in message
    assert message.endswith(f"got {value!r}")
    aadl.accelerate(optimizer)  # nothing was attached


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_a_good_value_is_taken_and_kept_as_a_plain_one(name, value):
    settings = aadl.accelerator_of(sgd(**{name: value})).settings
    if not isinstance(value, (np.generic, int, float)) or isinstance(value, bool):
        return
    kept = getattr(settings, "regularization" if name == "reg_acc" else name)
    assert kept == value
    assert type(kept) is (int if name in COUNTS else float)


def test_settings_of_memory_and_ranks_are_keyword_only():
    optimizer = sgd()
    settings = aadl.accelerator_of(optimizer).settings
    names = ("shard_history", "history_device", "fused", "local_sgd")
    assert [getattr(settings, name) for name in names] == [False, None, False, False]
    parameters = inspect.signature(aadl.accelerate).parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names)


def test_a_sharded_history_of_ranks_with_weights_of_their_own_is_refused():
    with pytest.raises(ValueError, match=r"shard_history must be False with local_sgd.*got True"):
        sgd(shard_history=True, local_sgd=True)
    sgd(local_sgd=True)


@pytest.mark.parametrize("name", ["shard_history", "local_sgd", "history_device", "fused"])
def test_settings_about_ranks_and_devices_change_nothing_in_a_single_process(name):
    ends = []
    settings = EAGER | {"store_each_nth": 2, "frequency": 4, "safeguard": False, "average": False}
    for more in ({}, {name: "cpu" if name == "history_device" else True}, {"relaxation": 0.5}):
        model = network()
        optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), **settings | more)
        train(model, optimizer, 20)
        ends.append(copy.deepcopy(model.state_dict()))
    assert aadl.accelerator_of(optimizer).statistics["accepted"] > 2
    assert identical(ends[0], ends[1]) and not identical(ends[0], ends[2])


def test_average_is_on_by_default_unless_nothing_is_accelerated():
    assert aadl.accelerator_of(sgd()).settings.average == "auto"
    assert aadl.accelerator_of(sgd(average=True)).settings.average == "auto"
    assert aadl.accelerator_of(sgd(acceleration_type="identity")).settings.average is False


def test_foreign_objects_are_named():
    for foreign in (object(), None, network(), torch.optim.SGD):
        for function in (aadl.accelerate, aadl.accelerator_of, aadl.remove_acceleration, aadl.reset_history):
            with pytest.raises(ValueError, match=rf"torch\.optim\.Optimizer, got {type(foreign).__name__}"):
                function(foreign)


def test_an_optimizer_is_accelerated_once():
    optimizer = sgd()
    accelerator = aadl.accelerator_of(optimizer)
    with pytest.raises(ValueError, match="accelerated already"):
        aadl.accelerate(optimizer)
    assert aadl.remove_acceleration(optimizer) is optimizer
    assert repr(accelerator) == "AndersonAccelerator(removed)"
    for function in (aadl.accelerator_of, aadl.reset_history):
        with pytest.raises(ValueError, match="SGD is not accelerated"):
            function(optimizer)
    assert aadl.remove_acceleration(optimizer) is optimizer  # silent where there is nothing to remove
    assert aadl.reset_history(aadl.accelerate(optimizer)) is optimizer


def test_an_optimizer_without_trainable_parameters_is_refused():
    frozen = torch.optim.SGD(network().requires_grad_(False).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD has no parameter that requires a gradient"):
        aadl.accelerate(frozen)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.zeros(2, dtype=torch.float16), "torch.float16"),
        (torch.zeros(2, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_parameters_that_cannot_be_extrapolated_are_refused(parameter, message):
    parameter = torch.nn.Parameter(parameter)
    with pytest.raises(ValueError, match=rf"parameter of shape \(2,\).*{message}"):
        aadl.accelerate(torch.optim.SGD([parameter], lr=0.1))
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.1), **EAGER)
    train(model, optimizer, 6)
    optimizer.add_param_group({"params": [parameter]})
    with pytest.warns(UserWarning, match=rf"goes on without acceleration: parameter of shape \(2,\).*{message}"):
        losses = train(model, optimizer, 1)
    losses += train(model, optimizer, 6)  # warned once
    assert losses[-1] < losses[0]
    statistics = aadl.accelerator_of(optimizer).statistics
    assert (statistics["steps"], statistics["macro_steps"]) == (13, 6)
    optimizer.state_dict()
