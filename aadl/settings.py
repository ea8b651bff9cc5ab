"""The arguments of `aadl.accelerate`, validated."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

AccelerationType = Literal["anderson", "anderson_normal_equation", "identity", "nonlinear_gmres"]
Average = Literal["auto", "always"]
Safeguard = Literal["loss", "residual"]
StateCoupling = Literal["params", "combine", "full"]
Momentum = Literal["auto", "keep", "zero"]

TYPES = get_args(AccelerationType)
DEFAULTS = {"history_depth": 10, "store_each_nth": 10, "frequency": 20, "regularization": 1e-8}
RESIDUAL_DEFAULTS = {"history_depth": 20, "store_each_nth": 1, "frequency": 10, "regularization": 0.1}
"""Of 'nonlinear_gmres'."""
ONLY_WITH_RESIDUALS: dict[str, tuple[tuple[Any, ...], str]] = {
    "relaxation": ((1,), "1"),
    "average": ((None, False), "False"),
    "safeguard": ((True,), "True"),
    "state_coupling": (("full", "params"), "left out"),
    "shard_history": ((False,), "False"),
    "history_device": ((None,), "None"),
    "local_sgd": ((False,), "False"),
}
"""Arguments of which 'nonlinear_gmres' takes one value only: the values, and how an error names them."""
HISTORY_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Settings:
    """Validated arguments; see `aadl.accelerate` for their meaning.

    Raises:
        ValueError: naming the argument, its value and its range.
    """

    acceleration_type: AccelerationType
    relaxation: float
    wait_iterations: int
    history_depth: int
    store_each_nth: int
    frequency: int
    regularization: float
    average: bool | Average | None
    safeguard: bool | Safeguard
    average_tolerance: float
    average_window: int | None
    state_coupling: StateCoupling
    history_dtype: torch.dtype | None
    shard_history: bool = False
    history_device: str | None = None
    fused: bool = False
    local_sgd: bool = False
    momentum: Momentum = "auto"
    paced: bool = False
    """Whether the period of 'nonlinear_gmres' adapts; else it is `frequency`."""

    def __post_init__(self) -> None:
        given: Any = self.acceleration_type
        kind = given.lower() if isinstance(given, str) and given.lower() in TYPES else given
        _one_of("acceleration_type", kind, TYPES)
        average = kind not in ("identity", "nonlinear_gmres") if self.average is None else self.average
        _one_of("average", average, (False, True, *get_args(Average)))
        _one_of("safeguard", self.safeguard, (True, False, *get_args(Safeguard)))
        _one_of("state_coupling", self.state_coupling, get_args(StateCoupling))
        _one_of("history_dtype", self.history_dtype, HISTORY_DTYPES)
        _one_of("shard_history", self.shard_history, (True, False))
        _one_of("history_device", self.history_device, (None, "cpu"))
        _one_of("fused", self.fused, (True, False))
        _one_of("local_sgd", self.local_sgd, (True, False))
        _one_of("momentum", self.momentum, get_args(Momentum))
        self._check_kind(kind)
        if self.shard_history and self.local_sgd:
            raise ValueError("shard_history must be False with local_sgd: the weights of the ranks differ, got True")
        window = self.average_window
        plain = {  # plain numbers of Python, which state dicts may hold, whatever type was given
            "acceleration_type": kind,
            "relaxation": _number("relaxation", self.relaxation, "in (0, 1]", lambda v: 0 < v <= 1),
            "wait_iterations": _integer("wait_iterations", self.wait_iterations, 0),
            "history_depth": _integer("history_depth", self.history_depth, 0),
            "store_each_nth": _integer("store_each_nth", self.store_each_nth, 1),
            "frequency": _integer("frequency", self.frequency, 1),
            "regularization": _number("reg_acc", self.regularization, ">= 0 and finite", lambda v: 0 <= v < math.inf),
            "average_tolerance": _number("average_tolerance", self.average_tolerance, "> 0", lambda v: v > 0),
            "average_window": None if window is None else _integer("average_window", window, 2),
            "average": "auto" if average is True else average,
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def _check_kind(self, kind: str) -> None:
        """Raise ValueError for arguments that have no meaning for this kind of acceleration."""
        if kind != "nonlinear_gmres":
            if self.momentum != "auto":
                raise ValueError(f"momentum must be 'auto' with acceleration_type={kind!r}, got {self.momentum!r}")
            return
        for name, (values, text) in ONLY_WITH_RESIDUALS.items():
            value = getattr(self, name)
            if not any(value is allowed or value == allowed for allowed in values):
                raise ValueError(f"{name} must be {text} with acceleration_type='nonlinear_gmres', got {value!r}")

    @property
    def period(self) -> int:
        """Macro-steps between two accelerations: frequency in macro-steps, rounded up."""
        return -(-self.frequency // self.store_each_nth)

    @property
    def idle(self) -> bool:
        """Whether these settings accelerate nothing at all."""
        return self.history_depth == 0 or (self.acceleration_type == "identity" and self.average is False)

    def eigenvalue_cutoff(self, stored: torch.dtype) -> float:
        """Smallest eigenvalue of the equilibrated Gram matrix, relative to the largest, that is not rounding.

        float64 products carry errors of about 1e-16; rounding to bfloat16 adds (2^-9)^2 / 3 = 1.3e-6 to the diagonal.
        """
        return 1e-6 if stored == torch.bfloat16 else 1e-14

    def map_description(self) -> dict[str, Any]:
        """The arguments that define what a stored pair is."""
        return {
            "store_each_nth": self.store_each_nth,
            "history_depth": self.history_depth,
            "state_coupling": self.state_coupling,
            "history_dtype": str(self.history_dtype),
        }

    def __str__(self) -> str:
        if self.acceleration_type == "nonlinear_gmres":
            most = " at most" if self.paced else ""
            return (
                f"{self.acceleration_type}, wait_iterations={self.wait_iterations}, "
                f"history_depth={self.history_depth}, store_each_nth={self.store_each_nth}, "
                f"frequency={self.frequency}{most}, reg_acc={self.regularization:g}, momentum={self.momentum}"
            )
        return (
            f"{self.acceleration_type}, relaxation={self.relaxation:g}, wait_iterations={self.wait_iterations}, "
            f"history_depth={self.history_depth}, store_each_nth={self.store_each_nth}, frequency={self.frequency}, "
            f"reg_acc={self.regularization:g}, average={self.average}, safeguard={self.safeguard}, "
            f"state_coupling={self.state_coupling}"
        )


def with_defaults(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Replace None by the defaults of this kind of acceleration."""
    is_of_residuals = isinstance(kind, str) and kind.lower() == "nonlinear_gmres"
    defaults: dict[str, Any] = RESIDUAL_DEFAULTS if is_of_residuals else DEFAULTS
    paced = is_of_residuals and given.get("frequency") is None
    return {name: defaults[name] if value is None else value for name, value in given.items()} | {"paced": paced}


def history_device_for(given: Any, parameters: Sequence[torch.Tensor]) -> Any:
    """Translate a device into None, if the parameters lie there, or "cpu".

    Raises:
        ValueError: another device.
    """
    kinds = sorted({p.device.type for p in parameters})
    kind = given.partition(":")[0] if isinstance(given, str) else getattr(given, "type", given)
    if kind is None or kind == "cpu":
        return kind
    if isinstance(given, (str, torch.device)) and kinds == [kind]:
        return None
    raise ValueError(
        f"history_device must be None, 'cpu' or the device of the parameters ({', '.join(kinds)}), got {given!r}"
    )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def _number(name: str, value: Any, allowed: str, test: Callable[[float], bool]) -> float:
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with suppress(OverflowError):  # an integer beyond the range of floats
            if test(float(value)):
                return float(value)
    raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
