"""Stable Anderson acceleration for PyTorch optimizers.

    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

Lupo Pasini, Yin, Reshniak, Stoyanov, "Stable Anderson Acceleration for Deep Learning", arXiv 2110.14813.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from aadl.accelerator import AndersonAccelerator
from aadl.attached import accelerator_of, find_accelerator
from aadl.nonlinear_gmres import ResidualAccelerator
from aadl.parameters import all_parameters, maximizes
from aadl.porting import translated
from aadl.residual_pairs import Residuals
from aadl.settings import (
    AccelerationType,
    Average,
    Momentum,
    Safeguard,
    Settings,
    StateCoupling,
    history_device_for,
    with_defaults,
)
from aadl.statistics import Statistics
from aadl.wrappers import Target, target_of

__version__ = "0.2.0"
__all__ = [
    "AndersonAccelerator", "ResidualAccelerator", "Statistics", "accelerate", "accelerator_of",
    "distributed_accelerate", "remove_acceleration", "reset_acceleration_history", "reset_history",
]  # fmt: skip

Wrapped = TypeVar("Wrapped")
"""A torch.optim.Optimizer, or an object that holds one."""


def accelerate(
    optimizer: Wrapped,
    acceleration_type: AccelerationType = "anderson",
    relaxation: float = 1.0,
    wait_iterations: int = 1,
    history_depth: int | None = None,
    store_each_nth: int | None = None,
    frequency: int | None = None,
    reg_acc: float | None = None,
    average: bool | Average | None = None,
    *published: Any,
    safeguard: bool | Safeguard = True,
    average_tolerance: float = 0.7,
    average_window: int | None = None,
    state_coupling: StateCoupling = "full",
    history_dtype: torch.dtype | None = None,
    shard_history: bool = False,
    process_group: Any = None,
    history_device: str | torch.device | None = None,
    fused: bool = False,
    local_sgd: bool = False,
    residuals: Residuals | None = None,
    check: Residuals | None = None,
    momentum: Momentum = "auto",
    **published_by_name: Any,
) -> Wrapped:
    """Accelerate an optimizer in place; every later `optimizer.step()` may end in an Anderson candidate.

    Over macro-steps of `store_each_nth` optimizer steps, x_k -> g_k = G(x_k) with residual f_k = g_k - x_k, the
    history keeps the differences DF = [f_{j+1} - f_j], DG = [g_{j+1} - g_j] of the last pairs and makes the candidate

        x+ = g_k - DG gamma - (1 - relaxation) (f_k - DF gamma),
        gamma = argmin ||f_k - DF gamma||^2 + Tikhonov.

    With "nonlinear_gmres", for losses ||r(x)||^2, the history keeps pairs (x_j, r_j = r(x_j)) and makes the candidate

        x+ = x_k + sum_j gamma_j (x_j - x_k),
        gamma = argmin ||r_k + sum_j gamma_j (r_j - r_k)||^2 + damping,

    which is accepted if ||r(x+)||^2 < ||r_k||^2. The residuals come from `residuals`, or from the closure of `step`,
    which calls `aadl.accelerator_of(optimizer).observe(r)`.

    Args:
        optimizer: any torch.optim.Optimizer over float32, float64 or complex parameters, or a wrapper around one
            (docs/optimizers.md says which).
        acceleration_type: "anderson"; "anderson_normal_equation" (the same solver, a name of the published package);
            "identity" (no acceleration: the moving average only, and nothing at all unless `average` is given);
            "nonlinear_gmres" (residuals of a least-squares loss instead of updates). In capitals or not.
        relaxation: in (0, 1]; 1 is undamped.
        wait_iterations: >= 0 optimizer steps before the first acceleration.
        history_depth: >= 0 columns kept; 0 leaves the base optimizer alone. None means 10, with "nonlinear_gmres" 20.
        store_each_nth: >= 1 optimizer steps in a macro-step, or between two pairs. None means 10, with
            "nonlinear_gmres" 1.
        frequency: >= 1 optimizer steps between two accelerations, rounded up to macro-steps (not with
            "nonlinear_gmres"). None means 20. With "nonlinear_gmres" it means 10, and down to 2 if the steps in between
            undo what an acceleration has gained (`aadl.pace`).
        reg_acc: Tikhonov factor >= 0, relative to columns of unit length; None means 1e-8. With "nonlinear_gmres" it is
            the smallest damping: None means 0.1, 0 no damping at all.
        average: False; True or "auto" (mix moving averages of the pairs while the relative standard deviation between
            consecutive updates exceeds `average_tolerance`, until it falls below half of that); "always". None means
            True, with "identity" False.
        safeguard: which candidates are accepted (`aadl.acceptance`). "residual": those that do not point back against
            the update; acceleration pauses when the next residual exceeds the predicted one by 1.2, and the plain
            iterate is put back when the residual doubles or later updates point back along the step. "loss": these, if
            the loss of the closure given to `step` falls too (two evaluations without a trace). True: "loss" if `step`
            gets a closure of the user that returns the loss, else "residual" (also for closures of Lightning, whose
            metrics would count trials). False: all of them.
        average_tolerance: > 0; see `aadl.smoothing.relative_standard_deviation` (0: parallel updates, 1: independent).
        average_window: >= 2 pairs to average; None means 3.
        state_coupling: what is extrapolated. "params": parameters (of
            optimizers with momentum only where store_each_nth > 1); "combine": also momentum buffers, with the same
            coefficients; "full": also, and their residuals enter the least-squares problem.
        history_dtype: of the stored differences: None (as the parameters), torch.float32, float64 or bfloat16.
        shard_history: keep 1 / P of every vector on each of P ranks that hold whole replicas (DistributedDataParallel);
            an accepted candidate is gathered. Not for parameters that are sharded themselves.
        process_group: ranks that decide together, by one sum of inner products per acceleration; None for all ranks
            of torch.distributed, if any. Ranks that train models of their own need groups of their own.
        history_device: None or the device of the parameters (rows lie there), or "cpu": rows in pinned memory of the
            host, which the host combines itself (docs/performance.md has the price).
        fused: whether the passes over memory run in kernels that torch.compile makes. That takes a C++ compiler on a
            CPU, and half a minute at the first accelerations; docs/performance.md says after how many it pays.
        local_sgd: whether the ranks hold weights of their own that somebody averages now and then. Every rank keeps a
            history of its own and forgets it when its weights were averaged. Candidates are accepted by vote, or with
            safeguard="loss" by the mean loss at their average. All ranks must make the same number of steps (no
            GradScaler).
        residuals: () -> r, a tensor or a list of tensors: the residuals of the loss at the present weights, on points
            that stay (docs/method.md says what else they must be). It runs no backward pass into the weights. Only with
            "nonlinear_gmres", and None there if closures hand them over.
        check: () -> residuals on other points, whose sum of squares must fall too; None if there are no such points.
        momentum: whether momentum buffers stay as they are when "nonlinear_gmres" accepts a candidate ("keep"), or are
            cleared ("zero"). "auto": cleared while accelerations come more often than `frequency`, unless the optimizer
            normalizes its steps (Muon, Lion, sign methods).

    Inside `torch.distributed.optim.ZeroRedundancyOptimizer` the optimizer is accelerated with safeguard "residual",
    inside `PostLocalSGDOptimizer` with local_sgd.

    Memory: 2 history_depth + 3 vectors for the parameters, as many for their momentum with "full", history_depth + 2
    with "combine": 46 parameter vectors with momentum at the defaults, of sharded parameters the local shards only.
    `aadl.accelerator_of(optimizer).history_bytes` says the bytes before the first step. The lean setting is
    history_depth=5, history_dtype=torch.bfloat16, state_coupling="params": 8 vectors. "nonlinear_gmres" keeps
    history_depth + 2 vectors for the parameters, and as many of residuals.

    Returns:
        The same optimizer. `aadl.accelerator_of(optimizer)` is its accelerator: `statistics` count what happened
        (`aadl.Statistics` lists them), and `repr` names the optimizer, the settings and the accepted candidates.

    Raises:
        ValueError: an argument out of its range, an optimizer that is accelerated already or has nothing to train, a
            wrapper that changes the weights after the step inside it, parameters in half precision, shards of
            FullyShardedDataParallel, a layout of ranks that does not go with an argument. Nothing is attached then.
        TypeError: an argument that neither this nor the published package has.

    The first `optimizer.step()` raises torch.OutOfMemoryError, before it changes anything and on all ranks, if there is
    no room for the history; with "nonlinear_gmres" for its weights, and for its residuals when the first ones come.

    Sources: Walker and Ni, SIAM J. Numer. Anal. 49 (2011); Lupo Pasini et al., arXiv 2110.14813; Washio and
    Oosterlee, ETNA 6 (1997); He, arXiv 2506.01081. docs/method.md
    says what is done differently here, and why.
    """
    if find_accelerator(optimizer) is not None:
        raise ValueError("this optimizer is accelerated already: call aadl.remove_acceleration(optimizer) first")
    _check_group(process_group)
    target = target_of(optimizer)
    arguments: dict[str, Any] = {
        "safeguard": safeguard,
        "average_tolerance": average_tolerance,
        "average_window": average_window,
        "state_coupling": state_coupling,
        "history_dtype": history_dtype,
        "shard_history": shard_history,
        "history_device": history_device,
        "fused": fused,
        "local_sgd": True if target.kind == "averaged" else local_sgd,
        "momentum": momentum,
    }
    if published or published_by_name:
        arguments = translated(published, published_by_name, arguments)
    arguments["history_device"] = history_device_for(arguments["history_device"], all_parameters(target.optimizer))
    numbers = {
        "history_depth": history_depth,
        "store_each_nth": store_each_nth,
        "frequency": frequency,
        "regularization": reg_acc,
    }
    arguments |= with_defaults(acceleration_type, numbers)
    settings = Settings(acceleration_type, relaxation, wait_iterations, average=average, **arguments)
    if settings.acceleration_type == "nonlinear_gmres":
        _check_residuals(target, optimizer, residuals, check)
        ResidualAccelerator(target, settings, process_group, residuals, check)
        return optimizer
    for name, given in (("residuals", residuals), ("check", check)):
        if given is not None:
            raise ValueError(f"{name} must be None with acceleration_type={acceleration_type!r}, got {given!r}")
    if target.kind == "partitioned":
        _check_partitioned(settings)
        process_group = process_group or target.process_group
    AndersonAccelerator(target, settings, process_group)
    return optimizer


def distributed_accelerate(optimizer: Wrapped, *arguments: Any, **named: Any) -> Wrapped:
    """`accelerate`, by a name of the published package: ranks are found through torch.distributed by both."""
    return accelerate(optimizer, *arguments, **named)


def reset_history(optimizer: Wrapped) -> Wrapped:
    """Forget the history of an accelerated optimizer, e.g. after its data were exchanged; returns the optimizer."""
    accelerator_of(optimizer).reset()
    return optimizer


reset_acceleration_history = reset_history
"""Its name in the published package."""


def remove_acceleration(optimizer: Wrapped) -> Wrapped:
    """Detach the accelerator, if there is one; returns the optimizer, which is as if it had never been accelerated.

    Raises:
        ValueError: this is no optimizer.
    """
    accelerator = find_accelerator(optimizer)
    if accelerator is not None:
        accelerator.remove()
    return optimizer


def _check_group(process_group: Any) -> None:
    if process_group is None:
        return
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise ValueError(f"process_group must be None or a torch.distributed.ProcessGroup, got {process_group!r}")


def _check_residuals(target: Target, optimizer: Any, residuals: Any, check: Any) -> None:
    """Raise ValueError for what "nonlinear_gmres" does not work with."""
    if target.kind:
        raise ValueError(
            f"acceleration_type='nonlinear_gmres' does not work with a {type(optimizer).__name__}: the weights of its "
            f"ranks are not the same when a step ends"
        )
    if maximizes(target.optimizer) is not False:
        raise ValueError(
            f"acceleration_type='nonlinear_gmres' makes a sum of squares small, and this "
            f"{type(target.optimizer).__name__} has groups with maximize=True"
        )
    for name, given in (("residuals", residuals), ("check", check)):
        if given is not None and not callable(given):
            raise ValueError(f"{name} must be None or a function without arguments, got {given!r}")


def _check_partitioned(settings: Settings) -> None:
    """Raise ValueError for what a ZeroRedundancyOptimizer excludes, whose ranks get whole candidates after the step."""
    if settings.safeguard == "loss":
        raise ValueError("safeguard must be True, False or 'residual' for a ZeroRedundancyOptimizer, got 'loss'")
    for name in ("shard_history", "local_sgd"):
        if getattr(settings, name):
            raise ValueError(f"{name} must be False for a ZeroRedundancyOptimizer, whose ranks have parts, got True")
