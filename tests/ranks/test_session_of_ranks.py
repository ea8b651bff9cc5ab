"""The session of a run over two ranks: its end reads the vote of the last step."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from suite_cases import run_config

from experiments.distributed.departure import RanksDisagree
from experiments.distributed.interruption import Interruption
from experiments.distributed.ranks import Ranks
from experiments.runs.session import RunSession
from experiments.settings.run_config import SaveConfig


def end_after_a_step(rank, world_size, folder, evaluations):
    """What a rank raises that leaves its session after one step with so many evaluations of the loss; and what stays.

    A checkpoint lies there from the start.
    """
    place = folder / f"{evaluations[0] == evaluations[1]}.run"
    ranks = Ranks(rank=rank, world_size=world_size, host="here", hosts=("here", "here"))
    still = Interruption(environment={})
    said = None
    try:
        with RunSession(place, run_config("sgd"), ranks, "", SaveConfig(), still, print) as session:
            if rank == 0:
                (place / "step-0000000001").write_bytes(b"saved")
            run = SimpleNamespace(num_steps=1, closure=SimpleNamespace(evaluations=evaluations[rank]))
            session.after_step(run, torch.tensor(1.0))
    except RanksDisagree as error:
        said = str(error)
    dist.barrier()  # rank 0 removes the checkpoints
    return said, [path.name for path in place.glob("*")]


def end_both_ways(rank, world_size, folder):
    return [end_after_a_step(rank, world_size, folder, evaluations) for evaluations in ((2, 2), (2, 3))]


def test_ranks_that_differed_in_the_last_step_do_not_finish_the_run(spawn_ranks, tmp_path):
    text = "the ranks have taken different decisions at step 1: ranks 0 and 1 differ"
    same, other = zip(*spawn_ranks(end_both_ways, 2, tmp_path), strict=True)
    assert same == ((None, []), (None, []))
    assert other == ((text, ["step-0000000001"]), (text, ["step-0000000001"]))
