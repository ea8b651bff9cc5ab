"""TensorBoard by a setting: what is written, by which rank, and where a resumed run goes on."""

import sys
import types

import numpy as np
import pytest
from suite_cases import RAW, needs, run_config

from experiments.catalog import parse_config
from experiments.distributed.ranks import Ranks
from experiments.records.reading import read_run
from experiments.records.status import tensorboard_folder
from experiments.records.tensorboard import TensorBoard, check_tensorboard
from experiments.runs.execute import execute_run
from experiments.settings.run_config import SaveConfig
from experiments.training.train import Training


class Writer:
    """Stands for `SummaryWriter`, and keeps what it gets."""

    made = ()

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.is_closed = folder, purge_step, {}, False
        Writer.made = (*Writer.made, self)

    def add_scalar(self, name, value, place):
        self.scalars.setdefault(name, []).append((place, value))

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


def put_in_place(monkeypatch):
    """Takes the place of the package."""
    monkeypatch.setattr(Writer, "made", ())
    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)


@pytest.fixture
def writers(monkeypatch):
    """The writers that were made."""
    put_in_place(monkeypatch)
    return lambda: Writer.made


def test_the_series_of_a_run_are_written_as_they_come(tmp_path, writers):
    path = execute_run(run_config("sgd_aadl"), Ranks(), tmp_path, save=SaveConfig(tensorboard=True))
    [writer] = writers()
    assert writer.folder == str(tensorboard_folder(path)) and writer.purge_step == 0 and writer.is_closed
    for name, values in read_run(path).series.items():
        places, scalars = zip(*writer.scalars[name], strict=True)
        assert list(places) == list(range(len(values) - len(places), len(values)))  # a cause may occur late
        assert np.array_equal(scalars, values[-len(scalars) :], equal_nan=True)
    assert {value for _, value in writer.scalars["metrics/learning_rate"]} == {1e-3}
    assert {"metrics/train/loss", "metrics/validation/loss", "acceleration/attempts"} <= writer.scalars.keys()


def test_a_run_without_the_setting_writes_nothing(tmp_path, writers):
    execute_run(run_config(), Ranks(), tmp_path)
    assert writers() == ()


def _writers_of_rank(rank, world_size, results):
    put_in_place(pytest.MonkeyPatch())
    execute_run(run_config(), Ranks(rank=rank, world_size=world_size), results, save=SaveConfig(tensorboard=True))
    return [writer.scalars for writer in Writer.made]


def test_rank_0_alone_writes(tmp_path, spawn_ranks):
    ([scalars], others) = spawn_ranks(_writers_of_rank, 2, tmp_path)
    assert len(scalars["metrics/train/loss"]) == 11 and others == []


def test_a_resumed_run_writes_no_entry_twice(tmp_path, writers, monkeypatch):
    original = Training.train_interval

    def killed(run, session=None):
        if run.interval == 4:
            session.save(run)
            raise KeyboardInterrupt
        return original(run, session)

    save = SaveConfig(tensorboard=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "train_interval", killed)
        execute_run(run_config(), Ranks(), tmp_path, save=save)
    execute_run(run_config(), Ranks(), tmp_path, save=save)
    first, second = writers()
    assert [place for place, _ in first.scalars["metrics/train/loss"]] == [0, 1, 2, 3]
    assert [place for place, _ in second.scalars["metrics/train/loss"]] == list(range(4, 11))
    assert second.purge_step == 4


def test_a_missing_package_is_refused_before_any_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"^save\.tensorboard needs the package tensorboard, which is not"):
        parse_config(RAW | {"save": {"tensorboard": True}})
    assert not parse_config(RAW).save.tensorboard


@needs("tensorboard")
def test_the_package_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_tensorboard()
    for places in ((0, 1, 2), (2, 3)):
        board = TensorBoard(tmp_path)
        for place in places:
            board(place, {"metrics/train/loss": float(place + len(places))})
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("metrics/train/loss")]
    assert scalars == [(0, 3.0), (1, 4.0), (2, 4.0), (3, 5.0)]
