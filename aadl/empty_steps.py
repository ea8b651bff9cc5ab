"""Steps that write to no parameter, as optimizers make them that accumulate gradients in `step`: no steps of the map.

Behind a candidate such a step has the residual zero, as if the prediction had held to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadl.history_layout import Layout
from aadl.mixing import host_tensor
from aadl.progress import Progress
from aadl.ranks import local
from aadl.watch import Sample, Snapshot, have_moved, same_bits, versions_of

COMPARED = 64
"""After so many first steps of macro-steps in a row that changed weights and moved no version counter, one element is
asked before the counters; steps on a device are then believed to write, because the host waits for each comparison."""
ASKED = 3
"""Calls in a row within a macro-step that seem to have written nothing of which the parameters are summed."""


class EmptySteps:
    """Tells whether a step has written to a parameter.

    Version counters tell, unless the optimizer writes through `.data` or by kernels that leave them alone, as the fused
    ones of torch do. Whether it does is learned. Until a first step of a macro-step moves a counter, such steps are
    compared with the start of the macro-step, and no others. From then on every step that moves no counter is compared,
    until one of them turns out to have written: then the counters are believed no more.
    """

    def __init__(self) -> None:
        self._tensors: Sequence[Tensor] = ()
        self._versions: list[int] = []
        self._count = 0
        self._sample: Sample | None = None
        self._sums: list[list[float]] = []
        """Sums of the parameters after calls in a row that seem to have written nothing."""

    def begin(self, layout: Layout, progress: Progress, left: Snapshot | None) -> None:
        """Note the version counters before a step, and an element where the counters do not tell.

        Args:
            layout: of the history.
            progress: where the accelerator stands, and what it has learned of the optimizer.
            left: a snapshot of which they are still those; None to read them.
        """
        first, known = progress.in_macro_step == 0, progress.moves_counters
        if not (first or known):
            return
        if left is not None:
            self._tensors, self._versions, self._count = left.tensors, left.versions, len(left.trainable)
        else:
            self._tensors, self._versions = layout.parameters, versions_of(layout.parameters)
            self._count = len(layout.parameters)
        self._sample = None if known else Sample(layout.elements()[-1:])

    def is_empty(self, layout: Layout | None, progress: Progress, sample: Sample | None) -> bool:
        """Whether the step that ends has written to no parameter; False where nobody knows.

        Several ranks count alike whatever one of them sees, so that none waits for the others.

        Args:
            layout: of the history, if there are rows.
            progress: as for `begin`.
            sample: some elements after the last step of the running macro-step, if there was one.
        """
        tensors, self._tensors = self._tensors, ()
        if not tensors or layout is None:
            return False
        known = progress.moves_counters
        if not known and progress.unmarked_in_a_row >= COMPARED and (not layout.is_on_host or self._has_changed()):
            return False
        if have_moved(tensors, self._versions, self._count):
            self._sums = []
            progress.moves_counters, progress.is_empty = True, False
            return False
        first = progress.in_macro_step == 0
        if layout.history.ranks.size > 1:
            progress.is_empty = known and (first or progress.is_empty)
            return False
        if known and not first:
            if (sample is None or not sample.change()) and self._stay(layout):
                return True
            progress.moves_counters, self._sums = False, []
            return False
        same = not self._has_changed() and _is_at_start(layout)
        progress.moves_counters = known and same
        progress.unmarked_in_a_row = 0 if same else progress.unmarked_in_a_row + 1
        return same

    def _stay(self, layout: Layout) -> bool:
        """Whether the parameters are as after the call before, of which the first ones in a row are asked."""
        if len(self._sums) < ASKED:
            self._sums.append([float(p.detach().abs().sum()) for p in map(local, layout.parameters)])
        return all(same_bits(host_tensor(sums), host_tensor(self._sums[0])) for sums in self._sums)

    def _has_changed(self) -> bool:
        """Whether the element that was read before the step has another value now."""
        return self._sample is not None and self._sample.change() > 0


@torch.inference_mode(False)
@torch.no_grad()
def _is_at_start(layout: Layout) -> bool:
    """Whether the parameters are where the macro-step started."""
    return layout.is_at_start()
