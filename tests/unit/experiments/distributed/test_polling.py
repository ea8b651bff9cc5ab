from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from experiments.distributed.polling import Deadline, ask_all
from experiments.distributed.ranks import Ranks


@pytest.mark.parametrize(("first_is_there", "seconds"), [(False, 5), (True, 35)])
def test_a_rank_waits_longer_only_for_an_answer_that_may_come(monkeypatch, first_is_there, seconds):
    naps = []  # time passes where the ranks sleep, and nowhere else
    clock = SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps))
    monkeypatch.setattr("experiments.distributed.polling.time", clock)
    store = HashStore()
    if first_is_there:
        store.set("question 0", "null")
    assert ask_all(store, "question", Ranks(1, 2), None, list, Deadline(5), 30) is None
    assert sum(naps) == pytest.approx(seconds)
