"""Changes from outside: somebody other than the optimizer writes to the weights, and the pairs must stay true.

Between two macro-steps a write is confirmed by comparing the weights with the end of the last macro-step. Within a
macro-step there is nothing to compare with: writes after every step, or at equal distances, belong to the map;
any other write is a change, and the running macro-step is abandoned (docs/method.md).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from aadl.history import History
from aadl.history_layout import Layout
from aadl.watch import Sample, Snapshot, Writes, is_regular, kind_of_write, same_bits, snapshot_of, versions_of

EXCHANGED = "exchanged"
"""Kind of write: a tensor was replaced by another one."""


class Change(Enum):
    """What a write means for the pairs."""

    NONE = "the write belongs to the map, or there was none"
    RUNNING = "the running macro-step began before the write, and is no pair of the map"
    ENDED = "the macro-step that has ended contains the write, and its pair must go"


class OutsideWrites:
    """What is remembered of the tensors of one optimizer, and of the writes to them.

    Args:
        store_each_nth: steps in a macro-step.
        with_momentum: whether momentum buffers are looked at.
    """

    def __init__(self, store_each_nth: int, with_momentum: bool) -> None:
        self._steps, self._with_momentum = store_each_nth, with_momentum
        self.left: Snapshot | None = None
        """The tensors as the last hook left them; None where the next macro-step starts elsewhere."""
        self._heads: list[Tensor] = []
        """Some elements of the tensors at the end of the last macro-step."""
        self.sample: Sample | None = None
        """Some elements after the last step within the running macro-step."""
        self.writes: Writes = {}
        self._unseen = ""
        """Kind of the writes before a save that no step has seen yet."""
        self._first = ""
        """Kind of the writes that may be the first of many."""
        self._marks: list[float] = []
        """After a resume within a macro-step, some elements as they were at the save."""
        self._exchanged = False
        """Whether tensors were replaced within the running macro-step before a save."""
        self._doubtful = False
        """Whether the weights may have been filled through `.data` since the start of the macro-step to be judged."""
        self._leap = 0.0
        """How far elements were led through `.data` within the running macro-step."""
        self.written = False
        """Whether this rank saw a write within a macro-step since the last acceleration."""

    def state(self, optimizer: Optimizer | None, layout: Layout | None, has_values: bool) -> dict[str, Any]:
        """Plain values for a checkpoint.

        Args:
            optimizer: whose tensors are saved beside them; None if it no longer exists.
            layout: of the history, if there are rows.
            has_values: whether tensors have values, unlike in torch's FakeTensorMode.
        """
        within = self.sample is not None
        elements = layout.elements(anywhere=True) if layout is not None and within and has_values else []
        exchanged = within and self._is_exchanged(optimizer)
        return {
            "marks": Sample(elements).kept if within else self._marks,
            "exchanged": self._exchanged or exchanged,
            "writes": self.writes,
            "unseen": self._kind_since_left(),
            "first": self._first,
            "written": self.written,
            "doubtful": has_values and self.is_doubtful,
            "leap": max(self._leap, self.sample.change()) if has_values and self.sample is not None else self._leap,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.writes, self._unseen, self._first = saved["writes"], saved["unseen"], saved["first"]
        self.written, self._doubtful, self._leap = saved["written"], saved["doubtful"], saved.get("leap", 0.0)
        self._marks, self._exchanged = saved.get("marks", []), saved.get("exchanged", False)  # not in older states

    def look(self, optimizer: Optimizer) -> Snapshot:
        """The tensors of the optimizer as they are now; no element is read."""
        return snapshot_of(optimizer, self._with_momentum)

    # ---- noticing --------------------------------------------------------------------------------------------------

    def is_quiet(self) -> bool:
        """Whether nobody has written since the last step, and no earlier write waits for an explanation."""
        if self._steps == 1:
            return True
        left = self.left
        untouched = left is not None and versions_of(left.tensors) == left.versions
        return untouched and not self._first and (self.sample is None or not self.sample.change())

    def before_step(self, gap: int, in_macro_step: int, layout: Layout | None) -> Change:
        """Explain the writes since the last step.

        Args:
            gap: number of the gap between the last step and this one.
            in_macro_step: steps of the running macro-step that have ended.
            layout: of the history, if there are rows.
        """
        history = None if layout is None else layout.history
        self._leap = max(self._leap, self._since_save(layout), 0.0 if self.sample is None else self.sample.change())
        self._doubtful = self.is_doubtful
        kind, self._unseen = self._kind_since_left(), ""
        first, self._first = self._first, ""
        if first and first != kind:  # it came once, within the first macro-step or the one that began there
            return Change.ENDED if in_macro_step == 0 and history is not None else Change.RUNNING
        return self._change_of(kind, gap, in_macro_step, history, is_second=bool(first)) if kind else Change.NONE

    def after_macro_step(self, look: Snapshot, gap: int, history: History) -> Change:
        """Explain tensors that were replaced within the macro-step that ends with this look at them."""
        if self._steps == 1:
            return Change.NONE
        if self._exchanged or (self.left is not None and not look.keeps(self.left)):
            return self._change_of(EXCHANGED, gap, 0, history)
        if self.left is None and EXCHANGED in self.writes:
            is_regular(self.writes, EXCHANGED, gap, self._steps)  # after a resume: who did so regularly did it again
        return Change.NONE

    def _change_of(
        self, kind: str, gap: int, in_macro_step: int, history: History | None, is_second: bool = False
    ) -> Change:
        """What writes of this kind mean.

        Without a pair there is nothing to lose yet: the next gap tells whether the first write was one of many.

        Args:
            is_second: whether these writes came before the last step too.
        """
        if is_regular(self.writes, kind, gap, self._steps) or is_second:
            return Change.NONE
        if kind != EXCHANGED and in_macro_step == 0:  # the start is compared when the macro-step opens
            return Change.NONE
        if kind != EXCHANGED and history is not None and not history.has_pair and not history.columns:
            self._first = kind
            return Change.NONE
        return Change.RUNNING

    def _kind_since_left(self) -> str:
        """What was written since the last step; after a resume, what had been written at the save."""
        left = self.left
        return self._unseen if left is None else kind_of_write(left.versions, versions_of(left.tensors))

    def _since_save(self, layout: Layout | None) -> float:
        """At the first step after a resume: how far elements are from where they were at the save."""
        marks, self._marks = self._marks, []
        elements = layout.elements(anywhere=True) if marks and layout is not None else []
        return Sample(elements, marks).change() if len(elements) == len(marks) else 0.0

    def _is_exchanged(self, optimizer: Optimizer | None) -> bool:
        return optimizer is not None and self.left is not None and not self.look(optimizer).keeps(self.left)

    @property
    def is_doubtful(self) -> bool:
        """Whether the weights may have been filled through `.data` within the macro-step."""
        return self._doubtful or self._leap > 0 or (self.sample is not None and self.sample.change() > 0)

    def is_as_left(self, optimizer: Optimizer, layout: Layout | None) -> bool:
        """Whether nobody seems to have written to the tensors since the last hook left them."""
        if layout is None or self.left is None:
            return False
        look = self.look(optimizer)
        if not look.untouched_since(self.left):
            return False
        heads = layout.sample(layout.tensors(optimizer, look))
        return all(map(same_bits, self._heads, heads))

    def is_as_stepped(self, optimizer: Optimizer, layout: Layout, in_macro_step: int) -> bool:
        """Whether the tensors seem to be as the last step left them, or as they were saved after it.

        Args:
            in_macro_step: steps of the running macro-step that have ended.
        """
        if in_macro_step == 0:
            starts_here = layout.history.starts_at(layout.tensors(optimizer, self.look(optimizer)))
            return starts_here if self.left is None else self.is_as_left(optimizer, layout)
        if self.left is not None:
            return self.look(optimizer).untouched_since(self.left) and not self.is_doubtful
        elements = layout.elements(anywhere=True)
        return 0 < len(elements) == len(self._marks) and Sample(elements, self._marks).change() == 0

    # ---- remembering -----------------------------------------------------------------------------------------------

    def note_step(self, layout: Layout | None, in_macro_step: int) -> None:
        """Remember the version counters after a step, and within a macro-step a few elements.

        A step that writes to no parameter may write to momentum, which then belongs to the macro-step that begins.

        Args:
            layout: of the history, if there are rows.
            in_macro_step: steps of the running macro-step that have ended.
        """
        left = self.left
        if left is None or layout is None:
            return
        left.versions = versions_of(left.tensors)
        if in_macro_step == 0:
            return
        if self.sample is None:
            self.sample = Sample(layout.elements())
        else:
            self.sample.keep()

    def note_end(self, optimizer: Optimizer, layout: Layout, sampled: bool = True) -> None:
        """Remember the tensors as this hook leaves them, and some elements of them."""
        look = self.look(optimizer)
        self.left = look if layout.covers(look) else None
        self._heads = layout.sample(layout.tensors(optimizer, look)) if sampled and self.left is not None else []

    def end_macro_step(self) -> float:
        """Stop watching elements; return how far, at least, somebody has led the weights through `.data`."""
        leap, self._leap, self.sample, self._exchanged = self._leap, 0.0, None, False
        return leap

    def settle_doubt(self, on_trial: bool) -> None:
        """At the end of a macro-step, a doubt stays only while a confirmed candidate may be taken back."""
        self._doubtful = self._doubtful and on_trial

    def forget(self) -> None:
        """Forget the running macro-step; what is known of regular writes stays."""
        self.left = self.sample = None
        self.written, self._doubtful, self._leap = False, False, 0.0
        self._unseen, self._first, self._marks, self._exchanged = "", "", [], False
