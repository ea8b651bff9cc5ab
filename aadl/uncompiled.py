"""Keeps torch.compile away from functions of this package that compiled code calls.

If the compiler traced them, that would only cost compilations and warnings, and guards that fail a step later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

compiler_of_frames: Callable[[], Any] | None = None
"""Returns what torch.compile does with frames that begin here and now; None where torch has no such function.

Before torch 2.9 it may give away a reference that it does not own (pull request 156252 of pytorch mends it), which ends
Python after some ten thousand steps."""
if torch.__version__ >= "2.9":
    with suppress(ImportError):
        from torch._C._dynamo.eval_frame import get_eval_frame_callback

        compiler_of_frames = get_eval_frame_callback


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hide the function from the compiler if compiled code calls it; hiding it always would cost half a microsecond."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    compiler = compiler_of_frames
    if compiler is None:
        return disabled

    def call(*args: Any) -> Any:
        compiles = is_dynamo_compiling() or compiler() is not None
        return (disabled if compiles else function)(*args)

    return call


def pass_over(function: Callable[..., Any]) -> None:
    """Keep the compiler away from the frames of this function, but not from those that they call."""
    from torch._dynamo.decorators import skip

    skip(function)
