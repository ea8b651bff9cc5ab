"""Acceleration by the residuals of the loss in the suite: what is observed, counted, recorded, saved and refused."""

import copy
from dataclasses import replace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from image_runs import raw_config
from small_runs import identical
from stopped_runs import run_to_the_end
from suite_cases import PINN, RAW, build, pinn_run, run_config

import aadl
from experiments.admissions import problem as graduate_admissions
from experiments.admissions.settings import GraduateAdmissionsConfig
from experiments.catalog import parse_config
from experiments.distributed.interruption import Interruption
from experiments.distributed.ranks import Ranks
from experiments.pinn import points
from experiments.pinn.problem import PinnProblem
from experiments.records.reading import read_run
from experiments.runs.config import expand_runs
from experiments.runs.execute import execute_run
from experiments.training.stage import make_stages
from experiments.training.train import Training, train

LOSS, UNSEEN = "metrics/train/loss", "metrics/validation/loss"
RESIDUALS = {"acceleration_type": "nonlinear_gmres", "history_depth": 5, "frequency": 4}
ADAM = {"name": "Adam", "lr": 1e-2}
LBFGS = {"name": "LBFGS", "max_iter": 3, "line_search_fn": "strong_wolfe"}
LM = {"name": "LevenbergMarquardt"}


def trained(config, ranks=None):
    ranks = ranks or Ranks()
    problem = build(config, ranks)
    (stage,) = make_stages(problem, config.variant)
    return train(Training(problem, [stage], ranks)), problem, stage


def admissions_run(settings, **training):
    """A run of graduate admissions under SGD."""
    config = run_config("tuned_sgd_aadl", **training)
    return replace(config, variant=config.variant.model_copy(update={"acceleration": RESIDUALS | settings}))


# ---- residuals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"conditions": "hard", "num_conditions": 0}, {"chunk_points": 7}])
def test_an_evaluation_is_observed_as_it_is(more):
    problem = build(pinn_run(condition_weight=3.0, dtype="float64", **more), Ranks())
    model, points = problem.model, problem.points(problem.model, 0)
    seen = []
    loss = problem.backward(model, points, seen.append)
    gradients = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    assert torch.equal(problem.backward(model, points), loss)
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
    problem.linearize(model, points, seen.append)
    solved = problem.least_squares().solved()
    for found in seen:
        assert not found.requires_grad and float(found.square().sum()) == pytest.approx(float(loss), rel=1e-12)
        torch.testing.assert_close(found, solved, rtol=1e-10, atol=1e-14)
    assert len(seen) == 2


def _squares(rank, world_size, config):
    """Sums of squares on this rank, and numbers of residuals, of what is solved and what is checked."""
    problem = build(config, Ranks(rank=rank, world_size=world_size))
    is_pinn = isinstance(problem, PinnProblem)
    if is_pinn:
        problem.points(problem.model, 0)
    probe = {"check_points": 11} if is_pinn else {"probe_rows": 33, "check_rows": 15}
    return [(float(r.square().sum()), len(r)) for r in (make() for make in problem.least_squares(**probe))]


def test_rows_of_the_check_are_others():
    problem = build(run_config(), Ranks())
    train_set = torch.cat([torch.cat(batch, dim=1) for batch in problem.batches(1, 0)])

    def rows_of(make):
        """Rows of the training set with these residuals."""
        with torch.no_grad():
            error = problem.model(train_set[:, :-1]) - train_set[:, -1:]
        return {int((error.flatten() - r).abs().argmin()) for r in make()}

    solved, checked = map(rows_of, problem.least_squares(probe_rows=100, check_rows=50))
    assert len(solved) > 90 and len(checked) > 45 and not solved & checked  # some rows have the same residual
    whole = problem.least_squares()
    assert len(whole.solved()) == 320 and whole.checked is None
    with torch.no_grad():
        assert float(whole.solved().square().mean()) == pytest.approx(problem.evaluate(problem.model)[LOSS], rel=1e-5)
    assert len(problem.least_squares(check_rows=20).solved()) == 300


def test_points_of_the_check_are_drawn_with_the_others():
    problem = build(pinn_run(dtype="float64", resample_every=5), Ranks())
    checked = problem.least_squares(check_points=16).checked
    squares = []
    for iteration in (0, 4, 5):
        problem.points(problem.model, iteration)
        squares.append(float(checked().square().sum()))
    assert squares[0] == squares[1] != squares[2]
    problem.restore({"count": 0, "whole": problem.state()["whole"]})
    assert float(checked().square().sum()) == squares[0]


def test_the_loss_on_unseen_points_is_of_one_draw_that_training_does_not_see():
    config = pinn_run(dtype="float64", resample_every=5, condition_weight=3.0)
    draws, prepare = [], points.prepared

    def note(*arguments):
        draws.append(prepare(*arguments))
        return draws[-1]

    with mock.patch.object(points, "prepared", note):
        problem = build(config, Ranks())
        for iteration in (0, 5, 10):
            problem.points(problem.model, iteration)
    first, unseen, *later = draws
    others = [first, *later]
    assert len(others) == 3 and (len(unseen.interior), len(unseen.conditions)) == (32, 8)
    for name in ("interior", "conditions"):
        known = {tuple(row) for draw in others for row in getattr(draw, name).tolist()}
        assert not known & {tuple(row) for row in getattr(unseen, name).tolist()}
    with torch.no_grad():
        values = problem.evaluate(problem.model)
        assert values[UNSEEN] == pytest.approx(float(problem.loss(problem.model, unseen)), rel=1e-12)
    assert values[UNSEEN] != pytest.approx(values[LOSS], rel=1e-3)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [ADAM, {"name": "MuonAdam"}, LBFGS, LM], ids=lambda entry: entry["name"])
def test_observed_evaluations_cost_none_of_their_own(optimizer):
    training = {"iterations": 60, "evaluate_every": 20}
    plain, _, _ = trained(pinn_run({"optimizer": optimizer}, training, dtype="float64"))
    with mock.patch.object(aadl.ResidualAccelerator, "observe", autospec=True) as observe:
        observe.side_effect = OBSERVE
        result, _, stage = trained(
            pinn_run({"optimizer": optimizer, "acceleration": RESIDUALS}, training, dtype="float64")
        )
    statistics = stage.statistics()
    assert observe.call_count == result.iterations[-1] >= 60
    assert statistics["closure_evaluations"] == 0 and statistics["accepted"] >= 1
    events = statistics["steps"] // 4
    assert events + 1 + statistics["attempts"] == statistics["residual_evaluations"]  # 1: whether they stay
    evaluations = result.series["metrics/evaluations"]
    if optimizer is not LM:
        assert (evaluations == result.iterations + result.series["acceleration/residual_evaluations"]).all()
    assert result.series[LOSS][-1] < result.series[LOSS][0] and result.series[LOSS][-1] != plain.series[LOSS][-1]


OBSERVE = aadl.ResidualAccelerator.observe


def test_other_optimizers_hand_nothing_over():
    problem = build(pinn_run(), Ranks())
    backward, observers = problem.backward, []

    def note(model, points, observe):
        observers.append(observe)
        return backward(model, points, observe)

    config = pinn_run({"optimizer": ADAM, "acceleration": {}})
    (stage,) = make_stages(problem, config.variant)
    problem.backward = note
    train(Training(problem, [stage], Ranks()))
    assert set(observers) == {None} and stage.accelerator is None


@pytest.mark.parametrize("settings", [{}, {"probe_rows": 80, "check_rows": 80}], ids=["full", "small"])
def test_a_probe_of_the_training_set_pays(settings):
    more = {"history_depth": 10, "store_each_nth": 4, "frequency": 8}
    plain, _, _ = trained(run_config("tuned_sgd", epochs=40))
    result, _, stage = trained(admissions_run(settings | more, epochs=40))
    statistics = stage.statistics()
    assert statistics["attempts"] >= 18 and statistics["accepted"] >= 10
    assert result.series[LOSS][-1] < 0.8 * plain.series[LOSS][-1]
    assert statistics["rejected"].keys() <= {"residuals", "check"}
    # every fourth step, of 160: there, and every other time at a candidate; the check twice for an attempt; once more
    # because nobody knows whether the points stay
    assert statistics["residual_evaluations"] == 41 + (3 if settings else 1) * statistics["attempts"]


def test_new_points_void_the_history():
    config = pinn_run({"optimizer": ADAM, "acceleration": RESIDUALS}, {"iterations": 40}, resample_every=10)
    _, _, stage = trained(config)
    assert stage.statistics()["resets"] == {"user": 3}


def _train_rank(rank, world_size, config):
    torch.set_num_threads(1)
    squares = _squares(rank, world_size, config)
    result, problem, stage = trained(config, Ranks(rank=rank, world_size=world_size))
    weights = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])
    return weights, result.series[LOSS], copy.deepcopy(stage.statistics()), squares


@pytest.mark.parametrize("kind", ["pinn", "admissions"])
def test_two_ranks_train_as_one(spawn_ranks, kind):
    if kind == "pinn":
        settings = {"dtype": "float64", "num_points": 33, "num_conditions": 9, "condition_weight": 2.0}
        config = pinn_run({"optimizer": ADAM, "acceleration": RESIDUALS}, {"iterations": 24}, **settings)
    else:
        config = admissions_run({"probe_rows": 101, "check_rows": 33}, epochs=6)
    alone = _train_rank(0, 1, config)
    first, second = spawn_ranks(_train_rank, 2, config)
    for one, *parts in zip(alone[3], first[3], second[3], strict=True):
        assert sum(square for square, _ in parts) == pytest.approx(one[0], rel=1e-5)
        assert sum(length for _, length in parts) == one[1] and abs(parts[0][1] - parts[1][1]) <= 2
    assert [length for _, length in alone[3]] == ([42, 20] if kind == "pinn" else [33, 15])
    assert torch.equal(first[0], second[0]) and first[2]["accepted"] == second[2]["accepted"] == alone[2]["accepted"]
    assert alone[2]["accepted"] >= 2
    torch.testing.assert_close(first[0], alone[0], rtol=1e-3, atol=1e-4)
    assert first[1] == pytest.approx(alone[1], rel=1e-3)


# ---- records and checkpoints -----------------------------------------------------------------------------------------


def test_the_record_counts_what_became_of_candidates(tmp_path):
    config = pinn_run(
        {"optimizer": ADAM, "acceleration": RESIDUALS | {"check_points": 8}}, {"iterations": 80, "evaluate_every": 20}
    )
    path = execute_run(config, Ranks(), tmp_path, interruption=Interruption(environment={}))
    series = read_run(path).series
    names = ("accepted", "attempts", "gain", "trust_ratio", "damping", "residual_evaluations")
    assert all(np.isfinite(series[f"acceleration/{name}"][-1]) for name in names)
    rejected = sum(values[-1] for name, values in series.items() if "/rejected_" in name)
    assert rejected + series["acceleration/accepted"][-1] == series["acceleration/attempts"][-1] > 0
    with h5py.File(path) as file:
        printed = {name: file[name].attrs["long_name"] for name in ("acceleration/damping", UNSEEN)}
    assert printed == {
        "acceleration/damping": "damping of the mixing problem, relative to unit columns",
        UNSEEN: "training loss on points that training never sees",
    }


def stop_and_resume(rank, size, results, configs):
    """By configuration a run without a stop, and one that was stopped twice and goes on."""
    ranks = Ranks(rank, size, rank)
    outcomes = []
    for number, config in enumerate(configs):
        whole = run_to_the_end(config, ranks, results / f"whole-{number}")
        for stop in (6, 14):
            run_to_the_end(config, ranks, results / f"resumed-{number}", stop=stop)
        outcomes.append((whole, run_to_the_end(config, ranks, results / f"resumed-{number}")))
    return outcomes


def saved_configs():
    pinn = {"num_points": 33, "num_conditions": 9}
    training = {"iterations": 30, "evaluate_every": 10}
    adam = {"optimizer": ADAM, "acceleration": RESIDUALS}
    often = {"frequency": 1, "momentum": "zero", "check_points": 9}
    return [
        pinn_run(adam, training, **pinn),
        pinn_run(adam | {"acceleration": RESIDUALS | often}, training, resample_every=12, **pinn),
        admissions_run({"probe_rows": 101, "check_rows": 33, "store_each_nth": 2}, epochs=6),
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on_bit_for_bit(spawn_ranks, tmp_path, size):
    if size == 1:
        by_rank = [stop_and_resume(0, 1, tmp_path, saved_configs())]
    else:
        by_rank = spawn_ranks(stop_and_resume, size, tmp_path, saved_configs())
    for outcomes in by_rank:
        for (whole, resumed), (first, _) in zip(outcomes, by_rank[0], strict=True):
            assert whole.statistics["accepted"] >= 2 and whole.statistics["resets"].keys() <= {"user"}
            assert identical(whole.statistics, resumed.statistics)
            assert torch.equal(whole.weights, resumed.weights) and torch.equal(whole.weights, first.weights)


def go_on_with_other_ranks(rank, size, results, config):
    return run_to_the_end(config, Ranks(rank, size, rank), results)


def test_a_run_goes_on_at_another_number_of_ranks(spawn_ranks, tmp_path):
    config = saved_configs()[0]
    run_to_the_end(config, Ranks(), tmp_path, stop=14)
    outcomes = spawn_ranks(go_on_with_other_ranks, 2, tmp_path, config)
    for end in outcomes:
        statistics = end.statistics
        assert torch.equal(end.weights, outcomes[0].weights) and statistics["steps"] == 30
        assert statistics["resets"] == {"resumed": 1} and statistics["accepted"] >= 2


# ---- configuration ---------------------------------------------------------------------------------------------------


def with_acceleration(raw, settings, **more):
    raw = copy.deepcopy(raw)
    name = next(iter(raw["variants"]))
    raw["variants"][name] |= {"acceleration": {"acceleration_type": "nonlinear_gmres"} | settings, **more}
    return raw


@pytest.mark.parametrize(
    ("raw", "settings", "more", "message"),
    [
        (RAW, {"probe_rows": 0}, {}, r"acceleration: probe_rows must be greater than 0, got 0"),
        (RAW, {"check_rows": True}, {}, r"acceleration: check_rows must be an integer, got True"),
        (RAW, {"check_points": 3}, {}, r"unknown key variants\.sgd\.acceleration\.check_points; .*probe_rows"),
        (RAW, {"residuals": 3}, {}, r"unknown key variants\.sgd\.acceleration\.residuals"),
        (RAW, {"check": 3}, {}, r"unknown key variants\.sgd\.acceleration\.check;"),
        (RAW, {"acceleration_type": "anderson", "probe_rows": 3}, {}, r"unknown key .*probe_rows"),
        (RAW, {"momentum": "halve"}, {}, r"variants\.sgd\.acceleration: momentum must be"),
        (PINN, {"probe_rows": 3}, {}, r"unknown key variants\.adam\.acceleration\.probe_rows; .*check_points"),
        (
            PINN,
            {},
            {"problem": {"resample_every": 5, "history_on_resample": "keep"}},
            r"variants\.adam: problem\.history_on_resample must be reset with nonlinear_gmres .*, got 'keep'",
        ),
        (
            PINN,
            {},
            {"optimizer": LM, "problem": {"slope_weight": True}},
            r"variants\.adam: problem\.slope_weight must be false with nonlinear_gmres",
        ),
    ],
)
def test_a_mistake_is_named(raw, settings, more, message):
    parse_config(with_acceleration(raw, {}))
    with pytest.raises(ValueError, match=message):
        parse_config(with_acceleration(raw, settings, **more))


def test_points_that_stay_may_keep_the_history():
    parse_config(with_acceleration(PINN, {}, problem={"resample_every": None, "history_on_resample": "keep"}))


def test_classification_has_no_residuals(tmp_path):
    raw = with_acceleration(raw_config(tmp_path), {})
    with pytest.raises(ValueError, match=r"acceleration_type must not be nonlinear_gmres, because the loss is no sum"):
        parse_config(raw)


def test_a_probe_is_not_larger_than_the_training_set():
    config = parse_config(with_acceleration(RAW, {"probe_rows": 200, "check_rows": 121}))
    message = r"probe_rows and check_rows must be at most the 320 rows .* together, got 200 and 121"
    with pytest.raises(ValueError, match=message):
        expand_runs(config, num_rows=graduate_admissions.describe(GraduateAdmissionsConfig()).num_rows)
    expand_runs(parse_config(with_acceleration(RAW, {"probe_rows": 200, "check_rows": 120})), num_rows=320)
