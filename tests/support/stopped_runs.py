"""Runs that a signal stops after a step, as one of a scheduler does, and their ends."""

import copy
from contextlib import contextmanager, nullcontext
from signal import SIGUSR1, raise_signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from experiments.distributed.departure import Interrupted
from experiments.distributed.interruption import Interruption
from experiments.runs.execute import execute_run
from experiments.runs.session import RunSession
from experiments.training.train import Training


@contextmanager
def signal_after(step, number=SIGUSR1):
    """Signals this process once, after a step of the first run in this block."""
    after_step, steps = RunSession.after_step, [step]

    def signaled(session, run, loss):
        if run.num_steps in steps:
            steps.clear()
            raise_signal(number)
        after_step(session, run, loss)

    with mock.patch.object(RunSession, "after_step", signaled):
        yield


def run_to_the_end(config, ranks, results, stop=None, last=None, save=None):
    """Executes a run, which a signal stops after a step, and returns its end: state, weights, statistics.

    Args:
        config: the run.
        ranks: this process.
        results: the folder of the records.
        stop: the step after which this process gets the signal; None for none, and for a run that goes on to its end.
        save: the settings of saving.
        last: the step after which the run stops; stop + 1 if None, because the ranks vote one step later.
    """
    end, result = SimpleNamespace(), Training.result

    def kept(run, **kinds):
        if kinds["finished"]:
            weights = torch.cat([p.detach().reshape(-1) for p in run.problem.model.parameters()])
            statistics = run.stages[0].statistics
            end.__dict__.update(
                state=run.state()[0],
                weights=weights,
                statistics=copy.deepcopy(statistics()) if statistics is not None else None,
            )
        return result(run, **kinds)

    if stop is None:
        expected = nullcontext()
    else:
        expected = pytest.raises(Interrupted, match=rf"SIGUSR1 after step {last or stop + 1}; the state is saved")
    patched = mock.patch.object(Training, "result", kept)
    with Interruption(environment={}) as interruption, signal_after(stop), patched, expected:
        execute_run(config, ranks, results, interruption=interruption, **({} if save is None else {"save": save}))
    return end
