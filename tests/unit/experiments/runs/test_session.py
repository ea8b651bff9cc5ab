"""Runs that are stopped, saved and taken up again: the continuation repeats the uninterrupted run bit for bit."""

import contextlib
import json
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from image_runs import AADL, PUBLISHED, image_run, image_set
from small_runs import identical
from stopped_runs import run_to_the_end, signal_after
from suite_cases import FREE_ADAM, FREE_SGD, PINN, RAW, SOAP, SSBROYDEN, needs, pinn_run, run_config

from experiments.__main__ import main
from experiments.catalog import parse_config
from experiments.distributed.departure import Interrupted
from experiments.distributed.interruption import EXIT_RESUME, Interruption
from experiments.distributed.ranks import Ranks
from experiments.records.reading import read_run
from experiments.records.status import run_folder, run_path, state_of
from experiments.runs import execute
from experiments.runs.checkpoint import Checkpoints
from experiments.runs.execute import execute_run
from experiments.runs.lock import FolderInUse
from experiments.runs.session import FiniteLosses, OtherRun, RunSession
from experiments.settings.run_config import SaveConfig
from experiments.training.closure import Closure

TIMES = ("timing/", "metrics/evaluations_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "set")


def assert_same(config, tmp_path, stops):
    """A run that is stopped after some of its steps and goes on each time ends as one without a stop.

    `stops` are the steps after which the signal comes; a mapping has the last step of each part, too.
    """
    stops = stops if isinstance(stops, dict) else {stop: stop + 1 for stop in stops}
    whole = run_to_the_end(config, Ranks(), tmp_path / "whole")
    path = run_path(tmp_path / "resumed", config)
    for stop, last in stops.items():
        run_to_the_end(config, Ranks(), tmp_path / "resumed", stop, last)
        assert state_of(path, config, "", 1) == "unfinished"
    resumed = run_to_the_end(config, Ranks(), tmp_path / "resumed")
    assert not run_folder(path).exists()
    parts = ("model", "stages", "average", "updates", "plan", "problem", "num_steps")
    for name in parts:
        assert identical(whole.state[name], resumed.state[name]), name
    expected, record = read_run(run_path(tmp_path / "whole", config)), read_run(path)
    assert expected.series.keys() == record.series.keys()
    for name, values in expected.series.items():
        if not name.startswith(TIMES):
            assert np.array_equal(values, record.series[name], equal_nan=True), name
    assert record.attributes["restart_count"] == len(stops) and expected.attributes["restart_count"] == 0
    assert record.attributes["num_steps"] == expected.attributes["num_steps"]
    return record


IMAGES = {"plain": {}, "ema": {"ema_decay": 0.9}, "aadl": {"acceleration": AADL}, "published": {"published": PUBLISHED}}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "ema")) for name in IMAGES])
def test_image_classification_goes_on_in_mid_epoch(folder, tmp_path, name):
    config = image_run(folder, IMAGES[name], training={"epochs": 3, "batch_size": 8})
    record = assert_same(config, tmp_path, (1, 8))  # in the first epoch, and in the second
    if name != "plain" and name != "ema":
        assert record.series["acceleration/attempts"][-1] > 2
    seconds = record.series["timing/training_seconds"]
    assert (np.diff(seconds) > 0).all()


@pytest.mark.slow
def test_image_classification_goes_on_at_the_ends_of_epochs_and_with_workers(folder, tmp_path):
    workers = image_run(folder, problem={"num_workers": 2}, training={"batch_size": 8})
    assert_same(workers, tmp_path, {4: 5, 6: 6, 11: 12})  # of twelve; an epoch has six


@pytest.mark.parametrize("name", ["sgd", "sgd_ema", "sgd_aadl", "sgd_published"])
def test_graduate_admissions_goes_on(tmp_path, name):
    config = run_config(name, epochs=6, measure_updates=True)
    assert_same(config, tmp_path, (1, 5, 17))


SECOND = {"then": {"after": 12, "optimizer": {"name": "LBFGS", "max_iter": 3}}}


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ({"acceleration": {"store_each_nth": 1, "frequency": 2}}, {"resample_every": 5}),
        ({"acceleration": {"store_each_nth": 1, "frequency": 2}}, {"resample_every": 7, "adaptive_pool": 40}),
        (SECOND, {"resample_every": 5, "history_on_resample": "keep"}),
        ({"optimizer": {"name": "MuonAdam"}}, {}),
        ({"optimizer": {"name": "LevenbergMarquardt"}}, {"slope_weight": True}),
        ({"optimizer": {"name": "FrozenAdam", "freeze_after": 3}}, {}),
        ({"optimizer": SSBROYDEN}, {"dtype": "float64"}),
        pytest.param({"optimizer": SOAP}, {}, marks=needs("pytorch_optimizer")),
        pytest.param({"optimizer": FREE_ADAM}, {}, marks=needs("schedulefree")),
        pytest.param({"optimizer": FREE_SGD}, {}, marks=needs("schedulefree")),
    ],
    ids=[
        *("aadl", "adaptive", "second stage", "muon", "levenberg-marquardt", "frozen", "ssbroyden"),
        *("soap", "schedule-free adam", "schedule-free sgd"),
    ],
)
def test_physics_informed_networks_go_on(tmp_path, variant, problem):
    variant = {"optimizer": {"name": "Adam", "lr": 1e-2}} | variant
    has_rate = variant["optimizer"]["name"] not in ("LevenbergMarquardt", "SSBroyden")
    scheduler = {"name": "StepLR", "step_size": 4, "gamma": 0.5} if has_rate else None
    training = {"iterations": 20, "scheduler": scheduler}
    if variant["optimizer"]["name"] == "SSBroyden":  # its steps have about five iterations
        training |= {"iterations": 160, "evaluate_every": 160}
    config = pinn_run(variant, training, **problem)
    assert_same(config, tmp_path, (2, 9))


def test_random_numbers_go_on(tmp_path, monkeypatch):
    step, draws = Closure.step, []
    monkeypatch.setattr(Closure, "step", lambda closure: (draws.append(float(torch.rand(()))), step(closure))[1])
    config = run_config("sgd", epochs=3)
    run_to_the_end(config, Ranks(), tmp_path / "whole")
    whole = draws.copy()
    draws.clear()
    for stop in (5, None):
        torch.rand(7)  # what the process did before
        run_to_the_end(config, Ranks(), tmp_path / "resumed", stop)
    assert draws == whole and len(set(draws)) == len(draws) == 12


def test_a_stopped_run_is_unfinished_and_has_a_record_to_look_at(tmp_path):
    config = run_config("sgd_aadl", epochs=6)
    late = Interruption(environment={"AADL_END_TIME": "1000"}, clock=lambda: 1000.0)
    with pytest.raises(Interrupted, match=r"stopped by time limit after step 2; the state is saved"):
        execute_run(config, Ranks(), tmp_path, interruption=late)
    path = run_path(tmp_path, config)
    assert state_of(path, config, "", 1) == "unfinished"
    with h5py.File(path) as file:
        assert not file.attrs["complete"] and len(file["metrics/validation/loss"]) == 1
    with pytest.raises(OSError, match="is incomplete"):
        read_run(path)
    other = replace(config, training=config.training.model_copy(update={"epochs": 7}))
    with pytest.raises(OtherRun, match=r"its settings, its data or its batch over all ranks have changed; .*--force"):
        execute_run(other, Ranks(), tmp_path, interruption=Interruption(environment={}))
    execute_run(other, Ranks(), tmp_path, interruption=Interruption(environment={}), from_start=True)
    assert len(read_run(path).series["metrics/validation/loss"]) == 8
    assert read_run(path).attributes["restart_count"] == 0


def test_a_run_is_saved_by_the_clock(tmp_path, monkeypatch):
    config = run_config("sgd", epochs=3)
    steps = []
    save = RunSession.save

    def note(session, run):
        steps.append(run.num_steps)
        save(session, run)

    monkeypatch.setattr(RunSession, "save", note)
    often = SaveConfig(every_seconds=0.0)
    execute_run(config, Ranks(), tmp_path, save=often, interruption=Interruption(environment={}))
    assert len(steps) > 10 and not run_folder(run_path(tmp_path, config)).exists()
    execute_run(config, Ranks(), tmp_path / "rare", interruption=Interruption(environment={}))
    assert steps[-1] == 12 and len([step for step in steps if step == 2]) == 1


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path):
    config = run_config("sgd", epochs=2)
    place = run_folder(run_path(tmp_path, config))
    with RunSession(place, config, Ranks(), "", SaveConfig(), Interruption(environment={}), print) as session:
        session.check_lock()
        lock = next(place.glob("*lock*"))
        holder = json.loads(lock.read_text())
        lock.write_text(json.dumps(holder | {"token": "another", "host": "n2"}))
        with pytest.raises(FolderInUse, match=r"was taken over by process \d+ on n2"):
            session.check_lock()
        lock.unlink()
        with pytest.raises(FolderInUse, match="taken over by another job, which has ended"):
            session.check_lock()
        lock.write_text(json.dumps(holder))


def test_a_run_that_was_taken_over_at_its_end_writes_no_record(tmp_path, monkeypatch):
    config, train = run_config("sgd", epochs=2), execute.train
    path = run_path(tmp_path, config)

    def lose_the_folder(*arguments, **options):
        result = train(*arguments, **options)
        lock = next(run_folder(path).glob("*lock*"))
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another"}))
        return result

    monkeypatch.setattr(execute, "train", lose_the_folder)
    with pytest.raises(FolderInUse, match="was taken over by process"):
        execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))
    assert not path.exists()


def test_a_finished_record_stays_until_its_run_is_made_again_to_the_end(tmp_path):
    config = run_config("sgd", epochs=6)
    execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))
    path = run_path(tmp_path, config)
    whole = path.read_bytes()
    late = Interruption(environment={"AADL_END_TIME": "1000"}, clock=lambda: 1000.0)
    with pytest.raises(Interrupted):
        execute_run(config, Ranks(), tmp_path, interruption=late, from_start=True)
    assert path.read_bytes() == whole


def test_force_counts_for_the_first_start_of_a_job(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(execute, "runs_to_make", lambda *_, from_start, **__: seen.append(from_start) or ([], []))
    config, never = parse_config(RAW), Interruption(environment={})
    for restarts in (0, 1):
        ranks = Ranks(restart_count=restarts)
        execute.execute_experiment(config, ranks, tmp_path, num_jobs=1, force=True, interruption=never)
    assert seen == [True, False]
    assert capsys.readouterr().err == "--force counted for the first start of this job: now its runs go on\n"


def test_a_run_stops_in_time_for_its_longest_evaluation_and_three_saves(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("experiments.runs.session.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoints, "save", lambda *_, **__: now.__setitem__(0, now[0] + 40.0))
    stopper, place = Interruption(environment={}), tmp_path / "seed-0.run"
    run = SimpleNamespace(num_steps=1, goes_on=False, longest_evaluation=5.0, closure=SimpleNamespace(evaluations=0))
    run.clock = SimpleNamespace(stopped=contextlib.nullcontext)
    run.state, run.result = (lambda: ({}, {})), (lambda **_: None)
    with RunSession(place, run_config("sgd"), Ranks(), "", SaveConfig(), stopper, lambda _: None) as session:
        margins = []
        for evaluation in (5.0, 100.0, 5.0):
            run.longest_evaluation = evaluation
            session.after_interval(run)
            margins.append(stopper.margin_seconds)
        session.save(run)
        session.after_interval(run)
    assert [*margins, stopper.margin_seconds] == [60.0, 100.0, 100.0, 125.0]


def test_a_record_that_cannot_be_written_on_the_way_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    config = run_config("sgd", epochs=3)
    write = execute.write_run

    def failing(*arguments, complete, **more):
        if not complete:
            raise OSError(28, "No space left on device")
        write(*arguments, complete=complete, **more)

    monkeypatch.setattr(execute, "write_run", failing)
    often = SaveConfig(every_seconds=0.0)
    execute_run(config, Ranks(), tmp_path, save=often, interruption=Interruption(environment={}))
    assert len(read_run(run_path(tmp_path, config)).series["metrics/validation/loss"]) == 4
    assert "cannot be written now: [Errno 28]" in capsys.readouterr().err


def test_a_run_whose_loss_is_lost_ends_within_its_epoch(tmp_path, monkeypatch):
    config = run_config("sgd", epochs=4, batch_size=10)  # 32 steps an epoch
    step = Closure.step
    monkeypatch.setattr(Closure, "step", lambda closure: step(closure) * (math.nan if closure.num_losses == 5 else 1.0))
    execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))
    record = read_run(run_path(tmp_path, config))
    assert record.diverged and record.attributes["num_steps"] in range(6, 10)


def test_losses_are_judged_two_steps_late():
    finite = FiniteLosses()
    printed = [finite(torch.tensor(loss)) for loss in (1.0, math.inf, 2.0, 3.0, 4.0)]
    assert printed == [True, True, True, False, False]


def test_the_same_run_is_not_made_twice_at_a_time(tmp_path):
    config = run_config("sgd", epochs=2)
    place = run_folder(run_path(tmp_path, config))
    with (
        RunSession(place, config, Ranks(), "", SaveConfig(), Interruption(environment={}), print),
        pytest.raises(FolderInUse, match=r"run sgd, seed 0"),
    ):
        execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))
    execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))


def test_checkpoints_of_a_former_version_hold_no_run_up(tmp_path):
    config = run_config("sgd", epochs=2)
    path = run_path(tmp_path, config)
    (run_folder(path) / "step-0000000010" / "parts").mkdir(parents=True)
    assert state_of(path, config, "", 1) == "missing"
    execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))
    assert read_run(path).attributes["restart_count"] == 0 and not run_folder(path).exists()


def test_the_lock_is_given_back_where_the_ranks_do_not_meet(tmp_path, monkeypatch):
    def late(ranks, make, what, seconds):
        make()
        raise TimeoutError("rank 1 was late")

    monkeypatch.setattr("experiments.runs.session.by_first", late)
    config, place = run_config("sgd"), tmp_path / "seed-0.run"
    session = RunSession(place, config, Ranks(), "", SaveConfig(), Interruption(environment={}), print)
    with pytest.raises(TimeoutError), session:
        pass
    assert list(place.iterdir()) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def write(raw, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def command(config, results, *options):
    return main(["run", str(config), "--results", str(results), *options])


@pytest.mark.parametrize(
    ("raw", "number"), [(RAW, signal.SIGUSR1), (PINN, signal.SIGTERM)], ids=["epochs", "iterations"]
)
def test_a_signal_stops_the_command_and_the_same_command_goes_on(tmp_path, capsys, raw, number):
    config = write(raw, tmp_path)
    assert command(config, tmp_path / "whole", "--jobs", "1") == 0
    with signal_after(4, number):
        assert command(config, tmp_path / "again", "--jobs", "1") == EXIT_RESUME
    printed = capsys.readouterr().err
    assert f"stopped by {number.name} after step" in printed and "the same command goes on" in printed
    assert command(config, tmp_path / "again", "--jobs", "1") == 0
    assert "stopped on the way and taken up again: 1" in capsys.readouterr().err
    paths = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.h5"))
    assert len(paths) == 4
    for path in paths:
        whole, again = read_run(tmp_path / "whole" / path), read_run(tmp_path / "again" / path)
        for name in ("metrics/train/loss", "metrics/validation/loss"):
            if name in whole.series:
                assert np.array_equal(whole.series[name], again.series[name])


def stopped_and_resumed(rank, world_size, folder, results):
    """On each rank: what the ranks that stopped said, and the series of both runs."""
    config = image_run(folder, {"acceleration": AADL}, training={"epochs": 3, "batch_size": 12})
    ranks = Ranks(rank, world_size, rank)
    execute_run(config, ranks, results / "whole", interruption=Interruption(environment={}))
    with (
        signal_after(5 if rank == 1 else None),
        Interruption(environment={}) as interruption,
        pytest.raises(Interrupted) as interrupted,
    ):
        execute_run(config, ranks, results / "again", interruption=interruption)
    execute_run(config, ranks, results / "again", interruption=Interruption(environment={}))
    dist.barrier()  # rank 0 writes the records
    records = [read_run(run_path(results / name, config)) for name in ("whole", "again")]
    return str(interrupted.value), [record.series for record in records], records[1].attributes["restart_count"]


@pytest.mark.slow
def test_ranks_stop_at_the_same_step_and_go_on(folder, tmp_path, spawn_ranks):
    """Three of them, because sums over two are the same in any order."""
    outcomes = spawn_ranks(stopped_and_resumed, 3, folder, tmp_path)
    assert [message for message, _, _ in outcomes] == [
        "stopped by a signal or a time limit of another rank after step 6; the state is saved",
        "stopped by SIGUSR1 after step 6; the state is saved",
        "stopped by a signal or a time limit of another rank after step 6; the state is saved",
    ]
    _, (whole, again), restarts = outcomes[0]
    assert restarts == 1 and whole.keys() == again.keys()
    for name, values in whole.items():
        if not name.startswith(TIMES):
            assert np.array_equal(values, again[name], equal_nan=True), name
