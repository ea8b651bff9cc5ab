"""How ranks wait for each other: they look into the store of all ranks again and again.

A blocking wait would hold up the thread that watches the other ranks, and ends at a time of the store's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from experiments.distributed.ranks import Ranks

LONGEST_PAUSE_SECONDS = 1.0


class Deadline:
    """A point in time, with growing pauses until then."""

    def __init__(self, seconds: float) -> None:
        self._end, self.seconds, self._pause = time.monotonic() + seconds, seconds, 0.005

    def remaining(self) -> float:
        """Returns the seconds that are left, negative after the end."""
        return self._end - time.monotonic()

    def pause(self) -> bool:
        """Waits a little; returns False if no time was left."""
        left = self.remaining()
        time.sleep(max(0.0, min(self._pause, left)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return left > 0


def ask_all(
    store: Store,
    name: str,
    ranks: Ranks,
    own: Any,
    judge: Callable[[list[Any]], Any],
    deadline: Deadline,
    patience_seconds: float,
) -> Any:
    """Every rank says something, and rank 0 answers all of them: when all have said it, or when the time is up.

    Args:
        store: of all ranks.
        name: of this question, new in the store.
        ranks: this process.
        own: what this rank says, as JSON holds it.
        judge: called on rank 0 with what each rank has said, None for a rank that was not heard; returns the answer.
        deadline: how long rank 0 waits for the others, and these for rank 0.
        patience_seconds: how much longer the others wait for the answer if rank 0 has come by then; they get None
            where there is none in time.
    """
    answer_key = f"{name} answer"
    store.set(f"{name} {ranks.rank}", json.dumps(own))
    if ranks.rank > 0:
        is_first_there = False
        while not store.check([answer_key]):
            if deadline.pause():
                continue
            if is_first_there or not store.check([f"{name} 0"]):
                return None
            deadline, is_first_there = Deadline(patience_seconds), True
        return json.loads(store.get(answer_key))
    keys = [f"{name} {rank}" for rank in range(ranks.world_size)]
    while not (is_complete := store.check(keys)) and deadline.pause():
        pass
    heard = keys if is_complete else [key for key in keys if store.check([key])]
    said = dict(zip(heard, map(json.loads, store.multi_get(heard)), strict=True))
    answer = judge([said.get(key) for key in keys])
    store.set(answer_key, json.dumps(answer))
    return answer
