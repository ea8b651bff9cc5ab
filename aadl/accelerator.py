"""AndersonAccelerator: what users see of Anderson acceleration, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from aadl import compilation
from aadl import state as saved_state
from aadl.acceptance import Cause
from aadl.attached import VERSION, check_format
from aadl.decisions import Decisions
from aadl.history import History
from aadl.history_layout import Layout
from aadl.learning_rates import LearningRates
from aadl.losses import Losses
from aadl.macro_steps import MacroSteps
from aadl.outside import OutsideWrites
from aadl.parameters import all_parameters, makes_momentum, maximizes, tensors_are_fake, trainable_parameters
from aadl.progress import Progress
from aadl.ranks import shards_of
from aadl.settings import Settings
from aadl.statistics import Statistics
from aadl.wrappers import Target


class AndersonAccelerator(MacroSteps):
    """Anderson acceleration of one optimizer; made by `aadl.accelerate`, found by `aadl.accelerator_of`."""

    def __init__(self, target: Target, settings: Settings, process_group: Any = None) -> None:
        if settings.shard_history or settings.local_sgd:
            sharded = any(shards_of(p) > 1 for p in trainable_parameters(target.optimizer))
            name = "shard_history" if settings.shard_history else "local_sgd"
            if sharded:
                raise ValueError(f"{name} must be False: the parameters are sharded over the ranks already, got True")
        if settings.safeguard == "loss" and maximizes(target.optimizer) is None:
            raise ValueError(
                "safeguard must be True, False or 'residual' where only some parameter groups have maximize=True, "
                "because a saddle point has neither the lowest loss nor the highest, got 'loss'"
            )
        super().__init__(target, settings, process_group)

    # ---- public ----------------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """Counters and last values. Reading them waits for the device."""
        self._decisions.settle()
        return self._decisions.statistics

    @property
    def loss_weight(self) -> float:
        """Weight of this rank's losses in their mean over the ranks; 1 unless set, > 0, not part of the state.

        Ranks whose losses belong to different numbers of samples set those numbers.

        Raises:
            ValueError: the weight is not a finite number > 0.
        """
        return self._loss_weight

    @loss_weight.setter
    def loss_weight(self, weight: float) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(f"loss_weight must be a number > 0 and finite, got {weight!r}")
        self._loss_weight = float(weight)

    @property
    def history(self) -> History | None:
        """The stored pairs; None before the first step. For inspection: nothing may write to it."""
        return self._history

    @property
    def decisions(self) -> Decisions:
        """What the safeguard knows: the candidate on trial, the reach, the pauses. For inspection."""
        return self._decisions

    @property
    def losses(self) -> Losses:
        """The losses of the training that were seen of late. For inspection."""
        return self._losses

    @property
    def steps_in_macro_step(self) -> int:
        """Steps of the running macro-step that have ended."""
        return self._progress.in_macro_step

    @property
    def pair_learning_rate(self) -> float:
        """Mean learning rate behind the newest pair, in units of the first one of the history."""
        return 1.0 if self._rates.pair_factor is None else self._rates.pair_factor

    @property
    def is_copying(self) -> bool:
        """Whether a pair is on its way to a history on the host."""
        return self._postponed is not None

    @property
    def num_columns(self) -> int:
        """Columns that the history holds."""
        return 0 if self._history is None else len(self._history.columns)

    @property
    def history_bytes(self) -> int:
        """Bytes of the history on this rank, with the vectors of `aadl.history.Block`.

        Before the first step these are the bytes that it will take, without momentum that an optimizer outside of
        torch.optim may yet make.
        """
        if self._layout is not None:
            return self._layout.nbytes
        if self._is_off():
            return 0
        return self._new_layout(
            trainable_parameters(self.optimizer), makes_momentum(self.optimizer), planned=True
        ).nbytes

    @property
    def uses_compiled_kernels(self) -> bool:
        """Whether the passes over memory run in kernels made by torch.compile."""
        compiled = self._history is not None and any(block.fused for block in self._history.blocks)
        return compiled and not compilation.failure()

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self) -> None:
        """Forget the history, because the map changed: new data, a new loss, restored weights. Counters stay.

        A running macro-step is abandoned: the next optimizer step starts a new one.
        """
        self._decisions.settle()
        self._finish_push()
        self._decisions.reset(Cause.USER, self._history)
        self._progress.in_macro_step = 0
        self._outside.forget()

    def remove(self) -> None:
        """Detach: the optimizer is afterwards as if it had never been accelerated."""
        self._decisions.settle()
        super().remove()
        self._layout, self._postponed, self._losses = None, None, Losses()
        self._spare.drop()

    # ---- state -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # whose tensors no step could write to
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: `rows`, tensors by name (see aadl.state), and `values`, plain ones as JSON.

        Allocates the history where no step has done so, so that the state of a fresh accelerator has the same entries
        as a saved one and torch.distributed.checkpoint can load into it. The optimizer must have its own state by then.
        """
        self._decisions.settle()
        self._finish_push()
        fake = tensors_are_fake()
        if self._layout is None and self._handles and not self.settings.idle and not fake:
            parameters = self._extrapolated(self.optimizer)
            if parameters is not None:
                self._lay_out(parameters, makes_momentum(self.optimizer))
        layout, optimizer, positions = self._layout, self._optimizer(), None
        if layout is not None and optimizer is not None:
            positions = layout.positions(optimizer)
            layout = None if positions is None else layout
        # on several ranks each has seen its own, and rank 0 saves for all
        alone = self._ranks.size == 1 or self.settings.local_sgd
        plain = self._decisions.state() | {
            "map": self.settings.map_description(),
            "progress": vars(self._progress),
            "rates": self._rates.state(),
            "outside": self._outside.state(optimizer, layout, has_values=not fake),
            "parameters": positions,
            "history": None if layout is None else saved_state.plain_state_of(layout.history),
            "averaged": self.settings.local_sgd and self._is_changed(self.optimizer),
            "losses": self._losses.state(optimizer) if alone and not fake else {},
        }
        rows = {} if layout is None else layout.rows()
        return {"version": VERSION, "values": json.dumps(plain), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the saved accelerator would have; at another history_depth, with the newest columns that fit.

        Raises:
            ValueError: the state was saved for another map (store_each_nth, state_coupling, history_dtype, parameter
                shapes) or is no accelerator state. Nothing was changed then.
        """
        super().load_state_dict(state)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _checked(self, state: Any) -> dict[str, Any]:
        """The plain values of a saved state, and the layout that it fits; raises ValueError if there is none."""
        check_format(state)
        try:
            saved: dict[str, Any] = json.loads(state["values"])
            if saved["map"].get("acceleration_type", "anderson") != "anderson":
                raise ValueError(
                    f"the saved accelerator has acceleration_type={saved['map']['acceleration_type']!r}, this one "
                    f"acceleration_type={self.settings.acceleration_type!r}"
                )
            Decisions(self.settings).restore(saved)
            Progress(**saved["progress"]), LearningRates(**saved["rates"]), saved["averaged"]
            Losses.from_state(saved.setdefault("losses", {}))
            OutsideWrites(self.settings.store_each_nth, with_momentum=False).restore(saved["outside"])
            wanted, found = self.settings.map_description(), saved["map"]
            for name, value in wanted.items():
                if found.get(name) != value and name != "history_depth":
                    raise ValueError(f"the saved accelerator has {name}={found.get(name)!r}, this one {name}={value!r}")
            if saved["history"] is not None and self.settings.history_depth > 0:
                depth, saved_depth = self.settings.history_depth, found["history_depth"]
                saved["fields"] = saved_state.parsed_plain_state(saved["history"])
                if depth != saved_depth:
                    saved["slots"] = saved_state.slots_kept(saved["fields"], saved_depth, depth)
                momentum = any(name.startswith("momentum") for name in state["rows"])
                saved["layout"] = self._fitting_layout(momentum, saved.get("parameters"))
                saved_state.check_rows(state["rows"], saved["layout"].rows(), saved_depth)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the saved state of the accelerator is damaged: {error!r}") from None
        return saved

    def _fitting_layout(self, momentum: bool, positions: list[int] | None) -> Layout:
        """The layout of some parameters, with rows for momentum or without; a new one if there is none.

        Args:
            momentum: whether it has rows for momentum.
            positions: of the parameters among all those of the optimizer; None for those that are trainable now.
        """
        parameters, layout = trainable_parameters(self.optimizer), self._layout
        everyone = all_parameters(self.optimizer)
        if positions is not None and len(everyone) > max(positions, default=-1):
            parameters = [everyone[position] for position in positions]
        if layout is not None and layout.is_of(parameters) and layout.has_momentum == momentum:
            return layout
        return self._new_layout(parameters, momentum)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_over(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Continue from a saved state and its checked plain values."""
        layout = saved.get("layout")
        self._start_over()
        self._layout = layout
        if layout is not None:
            for block in layout.history.blocks:
                block.forget_fetch()
            saved_state.load_rows(state["rows"], layout.rows(), saved.get("slots"))
            saved_state.restore_plain_state(layout.history, saved["fields"], saved["history"]["starts_at_mapped"])
        self._decisions.restore(saved)
        self._progress, self._rates = Progress(**saved["progress"]), LearningRates(**saved["rates"])
        self._outside.restore(saved["outside"])
        self._averaged, self._losses = bool(saved["averaged"]), Losses.of(self.optimizer, saved["losses"])
        self._lacks_history = False
