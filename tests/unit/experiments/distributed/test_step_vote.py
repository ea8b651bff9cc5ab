"""StepVote: all ranks get the same flags, and stop at the same step."""

import os
import signal

import pytest
import torch.distributed as dist

from experiments.distributed.departure import RanksDisagree
from experiments.distributed.interruption import Interruption
from experiments.distributed.ranks import Ranks
from experiments.distributed.step_vote import StepVote, Tally


def quiet(**options):
    """An Interruption without the environment of this process."""
    return Interruption(environment={}, **options)


def test_a_single_rank_needs_no_process_group():
    vote = StepVote(Ranks())
    assert vote.result() is None
    vote.cast(3, stop=False, finite=True, fingerprint=-5)
    with pytest.raises(RuntimeError, match="before the result of the previous one"):
        vote.cast(4, stop=False, finite=True)
    assert vote.result() == Tally(3, False, True)
    assert vote.result() is None
    assert vote.vote_now(4, stop=True, finite=False) == Tally(4, True, False)
    assert vote.vote_now(4, stop=False, finite=True, save=True) == Tally(4, False, True, True)
    assert not dist.is_initialized()


def agreeing_ranks(rank, world_size):
    """Rank 1 is signaled in step 3 and has a NaN in step 2."""
    vote = StepVote(Ranks(rank, world_size))
    tallies, done = [], []
    with quiet() as interruption:
        for step in range(10):
            tally = vote.result()
            tallies.append(tally)
            if tally is not None and tally.stop:
                break
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            finite = not (rank == 1 and step == 2)
            vote.cast(step, bool(interruption.reason), finite, fingerprint=1000 + step)
            done.append(step)
    reported = {"tallies": tallies, "done": done, "now": vote.vote_now(99, rank == 0, True, 2**62 + 1, save=rank == 2)}
    for name, step, fingerprint in (("steps", 7 + rank, 0), ("fingerprints", 7, 1 - 3 * rank)):
        try:
            reported[name] = vote.vote_now(step, False, True, fingerprint)
        except RanksDisagree as error:
            reported[name] = str(error)
    reported["after"] = vote.vote_now(8, False, True, fingerprint=7)
    return reported


@pytest.mark.smoke
def test_all_ranks_hear_the_same_and_stop_at_the_same_step(spawn_ranks):
    reported = spawn_ranks(agreeing_ranks, 3)
    assert reported[0] == reported[1] == reported[2]
    first = reported[0]
    assert first["tallies"] == [None, *(Tally(step, step == 3, step != 2) for step in range(4))]
    assert first["done"] == [0, 1, 2, 3]
    assert first["now"] == Tally(99, True, True, True)
    assert first["steps"] == "the ranks are at different steps: rank 0 at step 7, rank 2 at step 9"
    assert first["fingerprints"] == "the ranks have taken different decisions at step 7: ranks 0 and 1 differ"
    assert first["after"] == Tally(8, False, True)
