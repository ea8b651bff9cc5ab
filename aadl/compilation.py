"""Kernels that torch.compile makes: one compiled copy of a function for every variant of its arguments.

Where compilation fails, this process gives compiled kernels up for good, and the plain kernels go on.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

failures: list[str] = []
"""Why compiled kernels do not work here, once that is known."""
variants: set[tuple[Any, ...]] = set()
"""Variants that were compiled: one for every kernel, number of rows and right sides, dtype of the rows, and option."""


def failure() -> str:
    """Why this process has given compiled kernels up; "" while it has not."""
    return failures[0] if failures else ""


@cache
def compiled(function: Callable[..., Tensor], variant: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A compiled copy of the function for one variant. Torch counts recompilations by code object, and gives up."""
    del variant
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True, options=_options_of_processor())


def _options_of_processor() -> dict[str, Any]:
    """Options that keep apart, in a cache that processors share, kernels for different vector instructions.

    torch generates code for vectors of one width, and its cache does not ask for the width unless it is set. Machine
    code is then made for the instructions of that width alone, not for all that the compiling processor has.
    """
    from torch._inductor import config, cpu_vec_isa

    options: dict[str, Any] = {"cpp.simdlen": cpu_vec_isa.pick_vec_isa().bit_width()}
    return options | ({"cpp.march": ""} if hasattr(config.cpp, "march") else {})


def run_compiled(function: Callable[..., Tensor], *arguments: Any) -> Tensor | None:
    """Return the result of the compiled function, or None where it cannot be compiled."""
    # with compilation switched off or a dispatch mode on, torch would run the function as it is written, row by row
    if failures or torch._dynamo.config.disable or torch._C._len_torch_dispatch_stack():
        return None
    variant = function, *map(_kind_of, arguments)
    try:
        if variant in variants:
            return compiled(function, variant)(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of the compiler
            result = compiled(function, variant)(*arguments)
        variants.add(variant)
        return result
    except Exception as error:  # compilers, headers and caches fail in many ways; the plain kernels always work
        failures.append(f"{type(error).__name__}: {error}".splitlines()[0][:300])
    with suppress(Warning):  # where warnings are errors, a warning must not end a step halfway
        warnings.warn(f"aadl goes on with uncompiled kernels, torch.compile failed: {failures[0]}", stacklevel=2)
    return None


def _kind_of(argument: Any) -> Any:
    """The properties of an argument for which torch compiles another variant."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device.type, argument.dim()
    if isinstance(argument, list | tuple):
        return tuple(map(_kind_of, argument))
    return argument
