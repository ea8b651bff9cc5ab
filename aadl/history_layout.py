"""Layout: the tensors that a history is made of, and the part of them that lies on this rank."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import state
from aadl.block import Block, Tensors, allocate, make_block
from aadl.history import History
from aadl.parameters import all_parameters, grouped, identity_of, momentum_of, states_of
from aadl.ranks import Ranks, local, shards_of
from aadl.settings import Settings
from aadl.watch import Snapshot, first_element

ELEMENTS = 4
"""Parameters of which an element is read before and after every step within a macro-step: 0.3 us each time."""


class Layout:
    """The history of some parameters and their momentum buffers.

    Args:
        parameters: those that are extrapolated.
        settings: history_depth, history_dtype, history_device, shard_history, state_coupling, fused.
        ranks: those whose sums make the inner products.
        partitioned: whether every rank holds other parameters.
        momentum: whether there are momentum buffers by now.
        planned: whether to allocate nothing, so that only `nbytes` is asked.

    Raises:
        ValueError: `process_group` does not hold every shard of the parameters.
        torch.OutOfMemoryError: there is no room for the rows; none of them is kept then.
    """

    agreed = False
    """Whether all ranks are known to have room for their rows."""

    def __init__(
        self,
        parameters: list[Tensor],
        settings: Settings,
        ranks: Ranks,
        partitioned: bool,
        momentum: bool,
        planned: bool = False,
    ) -> None:
        self.parameters, self.identity, self.groups = parameters, identity_of(parameters), grouped(parameters)
        self._settings, self._partitioned, self._planned = settings, partitioned, planned
        self._seen: tuple[Snapshot, list[Tensors]] | None = None
        self._elements: list[Tensor] | None = None
        most = max(map(shards_of, parameters), default=1)
        if not partitioned and ranks.size % most:
            raise ValueError(
                f"process_group must hold every shard of the parameters: some have {most}, it has {ranks.size} ranks"
            )
        cut = partitioned or settings.shard_history or any(shards_of(p) > 1 for p in parameters)
        self.history = History(settings.history_depth, [], ranks, partial=cut and ranks.size > 1)
        with_momentum = momentum and settings.state_coupling != "params"
        self.history.blocks += self._allocated("parameters", *(["momentum"] if with_momentum else []))

    @property
    def has_momentum(self) -> bool:
        return len(self.history.blocks) > len(self.groups)

    def add_momentum(self, optimizer: Optimizer) -> None:
        """Allocate rows for momentum buffers, which start at zero, where the optimizer has made some by now."""
        if self._settings.state_coupling == "params" or self.has_momentum:
            return
        states = states_of(optimizer)
        if any(momentum_of(states.get(p), p) is not None for p in self.parameters):
            self.history.blocks += self._allocated("momentum")
            self._seen = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows on this rank."""
        return sum(block.nbytes for block in self.history.blocks)

    def is_of(self, parameters: list[Tensor]) -> bool:
        """Whether the layout is that of these parameters, in these shapes."""
        return identity_of(parameters) == self.identity

    def positions(self, optimizer: Optimizer) -> list[int] | None:
        """Of the parameters among all those of the optimizer; None where one of them has left it."""
        places = {id(p): place for place, p in enumerate(all_parameters(optimizer))}
        found = [places[id(p)] for p in self.parameters if id(p) in places]
        return found if len(found) == len(self.parameters) else None

    def covers(self, look: Snapshot) -> bool:
        """Whether the trainable tensors of a snapshot are the parameters of the layout (in any shapes)."""
        trainable = [p for p, flag in zip(look.tensors, look.trainable, strict=False) if flag]
        return len(trainable) == len(self.parameters) and all(map(operator.is_, trainable, self.parameters))

    def tensors(self, optimizer: Optimizer, look: Snapshot) -> list[Tensors]:
        """Values of every block: the parameters, and their momentum buffers (None where there is none yet).

        The same lists as long as the same tensors lie in the same places, so that rows need not look again.
        """
        if self._seen is not None and look.same_places(self._seen[0]):
            return self._seen[1]
        tensors: list[Tensors] = [[local(p) for _, p in group] for group in self.groups]
        states = states_of(optimizer) if self.has_momentum else {}
        for group in self.groups if self.has_momentum else ():
            buffers = [momentum_of(states.get(p), p) for _, p in group]
            tensors.append([None if buffer is None else local(buffer) for buffer in buffers])
        self._seen, self._elements = (look, tensors), None
        return tensors

    def sample(self, tensors: list[Tensors]) -> list[Tensor]:
        """Some elements of every parameter.

        None on a device, which the host would have to wait for, and none of DTensors, about which ranks might disagree.
        """
        if self.history.partial and not self.asks:
            return []
        return [
            block.row.sample(values)
            for block, values in zip(self.history.blocks, tensors, strict=True)
            if block.kind == "parameters" and block.row.device.type == "cpu"
        ]

    @property
    def is_on_host(self) -> bool:
        """Whether all parameters on this rank lie on a CPU."""
        return all(block.row.device.type == "cpu" for block in self.history.blocks)

    def is_at_start(self) -> bool:
        """Whether the parameters on this rank are where the running macro-step started, those last looked at."""
        known = [] if self._seen is None else self._seen[1][: len(self.groups)]
        return bool(known) and all(
            torch.equal(block.start[part], value)
            for block, values in zip(self.history.blocks, known, strict=False)
            for part, value in block.read(values)
        )

    def elements(self, anywhere: bool = False) -> list[Tensor]:
        """Views of the first elements of a few parameters, the first and the last one among them.

        None where `sample` has none. A parameter that lies elsewhere by now is noticed by its place.

        Args:
            anywhere: whether those on a device count too.
        """
        if anywhere:
            return self._first_elements([p for p in self.parameters if p.device.type != "meta"])
        if self._elements is None:
            self._elements = self._first_elements([p for p in self.parameters if p.device.type == "cpu"])
        return self._elements

    def _first_elements(self, parameters: list[Tensor]) -> list[Tensor]:
        known = [] if self.history.partial and not self.asks else list(filter(Tensor.numel, map(local, parameters)))
        last = len(known) - 1
        places = {round(i * last / (ELEMENTS - 1)) for i in range(ELEMENTS)} if known else set()
        return [first_element(known[place]) for place in places]

    @property
    def asks(self) -> bool:
        """Whether ranks must ask each other if somebody wrote to a tensor, because each sees only its own tensors.

        Not about DTensors, which all ranks change together.
        """
        return self.history.partial and (self._partitioned or self._settings.shard_history)

    def rows(self) -> dict[str, Tensor]:
        """The vectors of the history by name, see aadl.state."""
        return state.rows_of(self.history, self.groups, self._settings.shard_history)

    def _allocated(self, *kinds: str) -> list[Block]:
        """Allocate blocks of these kinds, all or none of them."""

        def blocks(planned: bool) -> list[Block]:
            return [block for kind in kinds for block in self._blocks(kind, planned)]

        return blocks(True) if self._planned else allocate(blocks, self._settings)

    def _blocks(self, kind: str, planned: bool) -> list[Block]:
        settings, ranks = self._settings, self.history.ranks
        part = (ranks.index, ranks.size) if settings.shard_history else (0, 1)
        alone = self._partitioned or settings.shard_history  # every element counts once in a sum over the ranks
        once = alone or not self.history.partial
        return [
            make_block(
                kind,
                [local(p) for _, p in group],
                settings.history_depth,
                kind == "parameters" or settings.state_coupling == "full",
                settings.history_dtype,
                part=part,
                weight=1.0 if once else shards_of(group[0][1]) / ranks.size,
                fused=settings.fused,
                device=None if settings.history_device is None else torch.device(settings.history_device),
                planned=planned,
            )
            for group in self.groups
        ]
