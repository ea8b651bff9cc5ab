"""Optimizers of other packages: each trains, saves and resumes with acceleration, or is refused by name.

Packages that are not installed are skipped. An optimizer comes with its default arguments where it has some; those that
need more have it below. What an optimizer cannot do without acceleration either is not asked of it.
"""

import importlib
import importlib.util
import inspect
import io
import math
import re
import sys
import types

import pytest
import torch
from torch import nn

import aadl
from aadl.wrappers import REFUSED

INPUTS = torch.linspace(-1, 1, 96).reshape(32, 3)
TARGETS = torch.sin(3 * INPUTS).sum(1, keepdim=True)
SETTINGS = {"wait_iterations": 2, "history_depth": 4, "store_each_nth": 2, "frequency": 4}
STEPS = 40
WAY, END = 2.0, 1.02
"""How far losses may lie above those of the base optimizer, on the way and at the end (or above the first loss, since
some optimizers hardly move in so short a run, and others begin by going up)."""
FURTHER = {"Ranger21": {"num_iterations": STEPS}, "CAME": {"lr": 1e-3}, "SGDP": {"lr": 1e-2}} | {
    name: {"lr": 1e-2, "momentum": 0.9} for name in ("LARS", "LARS8bit", "LARS32bit", "SGD", "SGD8bit", "SGD32bit")
}
RATE = {"lr": 1e-2}
"""For those without a default."""
OF_MATRICES = {"Muon", "SingleDeviceMuon", "SpectralSphere"}
GROUPED = {"AdaGO", "AdaMuon", "MuonClip", "NorMuon", "MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam"}
"""Take matrices and other parameters as groups of their own."""
SECOND_ORDER = {"AdaHessian", "Adahessian", "SophiaH"}
LEFT_OUT = {
    "BSAM": "diverges on this problem by itself",
    "AdEMAMix32bit": "its own step fails on a CPU",
    "PagedAdEMAMix32bit": "its own step fails on a CPU",
    "muon.Muon": "needs torch.distributed",
    "torch_optimizer.Lookahead": "its state_dict drops what others add to that of the optimizer inside",
    "AdaLOMO": "steps within the backward pass",
    "LOMO": "steps within the backward pass",
    "AdamMini": "takes a model of a certain architecture",
    "DeMo": "needs einops",
    "DistributedMuon": "needs torch.distributed",
    "CPUOffloadOptimizer": "needs CUDA",
    "MuonWithAuxAdam": "needs torch.distributed",
    "PytorchLARS": "its own step fails without weight decay",
}


def modules_of_timm():
    """The modules of timm.optim, without timm itself, which imports torchvision."""
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]
    packages = {"timm": folder, "timm.optim": f"{folder}/optim"}
    before = {name: sys.modules.get(name) for name in packages}
    try:
        for name, path in packages.items():
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
        names = [
            "adabelief", "adafactor", "adamp", "adamw", "adan", "adopt", "lamb", "laprop", "lars", "lion", "lookahead",
            "madgrad", "mars", "nadamw", "nvnovograd", "rmsprop_tf", "sgdp", "sgdw",
        ]  # fmt: skip
        return [importlib.import_module(f"timm.optim.{name}") for name in names]
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def classes_of(*modules):
    """The optimizers that a package defines."""

    def is_own(kind, package):
        return inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind.__module__.startswith(package)

    found = [(name, kind) for module in modules for name, kind in list(vars(module).items())
             if is_own(kind, module.__name__.partition(".")[0])]  # fmt: skip
    return dict(found)


def of_pytorch_optimizer():
    package = importlib.import_module("pytorch_optimizer")
    kinds = map(package.load_optimizer, package.get_supported_optimizers())
    return {kind.__name__: kind for kind in kinds if not kind.__module__.startswith("torch.")}


NAMES = (
    "torchao.optim", "schedulefree", "prodigyopt", "lion_pytorch", "bitsandbytes.optim", "optimi", "muon",
    "came_pytorch", "adan_pytorch", "dadaptation", "torch_optimizer",
)  # fmt: skip
PACKAGES = {
    "pytorch_optimizer": of_pytorch_optimizer,
    "timm": lambda: classes_of(*modules_of_timm()),
    "transformers.optimization": lambda: {"Adafactor": importlib.import_module("transformers.optimization").Adafactor},
} | {name: lambda name=name: classes_of(importlib.import_module(name)) for name in NAMES}


def cases():
    for package, optimizers in PACKAGES.items():
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            reason = f"needs {package.partition('.')[0]}: pip install -r tests/frameworks/requirements-optimizers.txt"
            yield pytest.param(None, marks=pytest.mark.skip(reason), id=package)
            continue
        for name, kind in optimizers().items():
            reason = LEFT_OUT.get(name) or LEFT_OUT.get(f"{package}.{name}")
            marks = [pytest.mark.skip(reason)] if reason else []
            yield pytest.param(kind, marks=marks, id=f"{package}.{name}")


def network(kind):
    """Large enough a layer for 8-bit states, which small tensors do without."""
    torch.manual_seed(1)
    bias = kind.__name__ not in OF_MATRICES
    return nn.Sequential(nn.Linear(3, 72, bias), nn.Tanh(), nn.Linear(72, 72, bias), nn.Tanh(), nn.Linear(72, 1, bias))


def optimizer_of(kind, model):
    name, parameters = kind.__name__, list(model.parameters())
    needed = inspect.signature(kind.__init__).parameters
    further = FURTHER.get(name, {})
    if "lr" in needed and needed["lr"].default in (inspect.Parameter.empty, None) and name != "Adafactor":
        further = RATE | further
    if name in GROUPED or (name == "Muon" and kind.__module__.startswith("pytorch_optimizer")):
        matrices = [p for p in parameters if p.dim() == 2]
        parameters = [
            {"params": matrices, "use_muon": True},
            {"params": [p for p in parameters if p.dim() < 2], "use_muon": False},
        ]
    if name == "Lookahead":
        return kind(torch.optim.SGD(parameters, lr=1e-2), k=2)
    return kind(parameters, **further)


def loss_of(model):
    return (model(INPUTS) - TARGETS).square().mean()


def train(kind, model, optimizer, steps):
    """Losses before every step, and at the end."""
    losses = []
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward(create_graph=kind.__name__ in SECOND_ORDER)
        losses.append(float(loss.detach()))
        optimizer.step(*closures(kind, model, optimizer, loss))
    return [*losses, float(loss_of(model).detach())]


def closures(kind, model, optimizer, loss):
    """What `step` takes: the loss as it is, or once more at perturbed weights."""
    if kind.__name__ == "AliG":
        return [lambda: loss.detach()]

    def once_more():
        optimizer.zero_grad()
        value = loss_of(model)
        value.backward()
        return value

    return [once_more] if kind.__name__ == "BSAM" else []


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def started(kind, accelerated):
    model = network(kind)
    optimizer = optimizer_of(kind, model)
    return model, aadl.accelerate(optimizer, **SETTINGS) if accelerated else optimizer


def resumes(kind, accelerated):
    """Whether a run that is saved and loaded half-way goes on bit for bit; None where the package cannot load."""
    model, optimizer = started(kind, accelerated)
    train(kind, model, optimizer, STEPS // 2)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    torch.manual_seed(7)
    train(kind, model, optimizer, STEPS // 2)
    other_model, other = started(kind, accelerated)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    try:
        other_model.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    except Exception:
        if accelerated:
            raise
        return None
    if accelerated and kind.__module__.startswith("bitsandbytes."):  # which a warning says at the save
        aadl.accelerator_of(other).load_state_dict(saved[1]["aadl"])
    torch.manual_seed(7)
    train(kind, other_model, other, STEPS // 2)
    return all(map(torch.equal, weights(model), weights(other_model)))


@pytest.mark.parametrize("kind", list(cases()))
def test_it_trains_and_resumes_or_is_refused_by_name(kind):
    if any(re.search(pattern, kind.__name__, re.IGNORECASE) for pattern in REFUSED):
        optimizer = optimizer_of(kind, network(kind))
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot be accelerated: it "):
            aadl.accelerate(optimizer, **SETTINGS)
        with pytest.raises(ValueError, match="is not accelerated"):
            aadl.accelerator_of(optimizer)
        return
    plain_losses = train(kind, *started(kind, False), STEPS)
    if not all(map(math.isfinite, plain_losses)):
        pytest.skip("the base optimizer diverges")
    model, optimizer = started(kind, True)
    losses = train(kind, model, optimizer, STEPS)
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["steps"] == STEPS
    assert counts["macro_steps"] == STEPS // SETTINGS["store_each_nth"]
    assert all(map(math.isfinite, losses))
    assert max(losses) <= WAY * max(plain_losses)
    assert losses[-1] <= END * max(plain_losses[0], plain_losses[-1])
    if resumes(kind, False):
        assert resumes(kind, True)
    assert aadl.remove_acceleration(optimizer) is optimizer
    train(kind, model, optimizer, 1)


def wrapped_by_accelerate(optimizer):
    return importlib.import_module("accelerate").Accelerator(cpu=True).prepare(optimizer)


def wrapped_by_fabric(optimizer):
    fabric = importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(optimizer)


def wrapped_by(module, name, **arguments):
    return lambda optimizer: getattr(importlib.import_module(module), name)(optimizer, **arguments)


WRAPPERS = {
    "accelerate": (wrapped_by_accelerate, ""),
    "lightning": (wrapped_by_fabric, ""),
    "pytorch_optimizer, Lookahead": (wrapped_by("pytorch_optimizer", "Lookahead", k=2), ""),
    "pytorch_optimizer, OrthoGrad": (wrapped_by("pytorch_optimizer", "OrthoGrad"), ""),
    "pytorch_optimizer, Magma": (wrapped_by("pytorch_optimizer", "Magma"), ""),
    "pytorch_optimizer, TRAC": (wrapped_by("pytorch_optimizer", "TRAC"), "TRAC cannot be accelerated"),
    "pytorch_optimizer, ScheduleFreeWrapper": (
        wrapped_by("pytorch_optimizer", "ScheduleFreeWrapper"),
        "ScheduleFreeWrapper cannot be accelerated",
    ),
    "schedulefree": (wrapped_by("schedulefree", "ScheduleFreeWrapper"), "ScheduleFreeWrapper cannot be accelerated"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_seen_through_or_refused_by_name(name):
    pytest.importorskip(name.partition(",")[0])
    wrap, refusal = WRAPPERS[name]
    model = network(torch.optim.SGD)
    inner = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.5)
    wrapper = wrap(inner)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            aadl.accelerate(wrapper, **SETTINGS)
        with pytest.raises(ValueError, match="is not accelerated"):
            aadl.accelerator_of(inner)
        return
    assert aadl.accelerate(wrapper, **SETTINGS) is wrapper
    with pytest.raises(ValueError, match="accelerated already"):
        aadl.accelerate(wrapper)
    losses = train(torch.optim.SGD, model, wrapper, STEPS)
    counts = aadl.accelerator_of(wrapper).statistics
    assert counts["steps"] == STEPS and counts["attempts"] > 0
    assert losses[-1] < losses[0]
    assert aadl.remove_acceleration(wrapper) is wrapper


@pytest.mark.parametrize("halves", [True, False])
def test_sharpness_aware_minimization_is_accelerated_in_one_step_and_in_two_halves(halves):
    package = pytest.importorskip("pytorch_optimizer")
    model = network(torch.optim.SGD)
    optimizer = package.SAM(model.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.5)
    aadl.accelerate(optimizer, **SETTINGS)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return float(loss.detach())

    losses = []
    for _ in range(STEPS):
        losses.append(closure())
        if halves:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["steps"] == STEPS and counts["attempts"] > 0
    assert losses[-1] < losses[0]
