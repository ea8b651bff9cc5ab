import copy
import hashlib
import json
import math
import re

import pytest
import torch
import yaml
from paths import CONFIGS
from suite_cases import PINN, RAW, load_or_skip

from experiments.catalog import load_config, parse_config
from experiments.runs.config import expand_runs
from experiments.settings.overrides import read_overridden
from experiments.training import components


def with_value(path, value):
    raw = copy.deepcopy(RAW)
    level = raw
    for key in path[:-1]:
        level = level.setdefault(key, {})
    level[path[-1]] = value
    return raw


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


MINIMAL = """
experiment: graduate_admissions
scale: test
seeds: 0-2
training: {epochs: 3}
variants:
  plain:
    optimizer: &sgd {name: SGD, lr: 1e-3}
  fast:
    optimizer: {<<: *sgd, lr: 1e-1}
"""


def test_a_good_configuration_is_read_with_defaults(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert config.seeds == (0, 1, 2)
    assert (config.training.epochs, config.training.batch_size) == (3, 40)
    assert config.variants["plain"].label == "plain"
    assert config.variants["fast"].optimizer.arguments == {"lr": 0.1}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["epochs"], 5, r"^unknown key epochs; valid keys are: experiment, scale, seeds, problem, training"),
        (["training", "epoch"], 5, r"^unknown key training\.epoch; .*epochs \(default 100\).*; did you mean epochs\?$"),
        (["training", "epochs"], 0, r"^training\.epochs must be greater than 0, got 0"),
        (["training"], [1], r"^training must be a mapping of settings, got \[1\]"),
        (["training", "scheduler"], {"name": "StepLr"}, r"^training\.scheduler: name must be one of .*StepLR"),
        (["training", "scheduler"], {"name": "StepLR"}, r"^training\.scheduler: .*step_size"),
        (["training", "scheduler"], {"name": "ReduceLROnPlateau"}, r"^training\.scheduler: .*metrics"),
        (["training", "scheduler"], {"name": "StepLR", "step_size": 0}, r"^training\.scheduler: "),
        (["training", "scheduler"], {"name": "StepLR", "step": 1}, r"^unknown key training\.scheduler\.step"),
        (["problem", "split_seed"], 2**32, r"^problem\.split_seed must be less than 4294967296"),
        (["problem", "validation_fraction"], 1.0, r"^problem\.validation_fraction must be less than 1, got 1\.0"),
        (["problem", "activation"], "relus", r"^problem\.activation must be one of tanh, .*; did you mean relu\?$"),
        (["experiment"], "graduate", r"one of graduate_admissions, burgers_2d, .*, got 'graduate'"),
        (["studies", "lr"], {}, r"^unknown key studies\.lr; valid keys are: learning_rate .*, batch_size"),
        (["save"], {"agree_every": 2}, r"^unknown key save\.agree_every, which was removed: leave it out$"),
        (["launch"], {"nccl": {}}, r"^unknown key launch\.nccl, which was removed: export its variables"),
        (["experiment"], None, r"^experiment must be a text, got None"),
        (["scale"], "../x", r"^scale must be a name"),
        (["seeds"], [0, 0], r"^seeds must have no entry twice"),
        (["variants"], {}, r"^variants must have at least 1 item, got {}"),
        (["variants", "a b"], {"optimizer": {"name": "SGD"}}, r"^a name in variants must be a name"),
        (["variants", "sgd", "optimiser"], {}, r"^unknown key variants\.sgd\.optimiser; valid keys are: label"),
        (["variants", "sgd", "then"], {"optimizer": {"name": "SGD"}, "after": 1}, r"^unknown key variants\.sgd\.then"),
        (["variants", "sgd", "optimizer"], None, r"^variants\.sgd\.optimizer must be a mapping with a name"),
        (["variants", "sgd", "optimizer", "name"], "Sgd", r"optimizer: name must be one of .*, got 'Sgd'"),
        (["variants", "sgd", "optimizer", "rate"], 1, r"^unknown key variants\.sgd\.optimizer\.rate; .*lr \(default"),
        (["variants", "sgd", "optimizer", "lr"], True, r"optimizer: lr must be a number, got True"),
        (["variants", "sgd", "optimizer", "lr"], math.nan, r"optimizer: lr must be finite, got nan"),
        (["variants", "sgd", "optimizer", "lr"], -1.0, r"^variants\.sgd\.optimizer: Invalid learning rate"),
        (
            ["variants", "sgd", "optimizer"],
            {"name": "Adam", "betas": [0.9]},
            r": Adam refuses betas = \(0\.9,\): tu",
        ),
        (["variants", "sgd", "ema_decay"], 1.0, r"^variants\.sgd\.ema_decay must be less than 1, got 1\.0"),
        (["variants", "sgd_aadl", "acceleration", "depth"], 3, r"acceleration\.depth; valid .*history_depth \(default"),
        (["variants", "sgd_aadl", "acceleration", "process_group"], 3, r"unknown key .*process_group"),
        (["variants", "sgd_aadl", "acceleration", "relaxation"], 2.0, r"variants\.sgd_aadl\.acceleration: relaxation"),
        (["variants", "sgd_aadl", "acceleration", "history_dtype"], "int8", r"acceleration: history_dtype"),
        (["variants", "sgd_aadl", "published"], {}, r"acceleration and published exclude each other"),
        (["variants", "sgd", "published"], {"history_depth": 2}, r"published\.history_depth must be greater than or"),
        (["variants", "sgd", "published"], {"frequency": 0}, r"published\.frequency must be an integer >= 1, got 0"),
        (["baseline"], "adam", r"^baseline must be one of sgd, sgd_aadl, got 'adam'"),
        (["studies", "learning_rate"], {"variants": ["sgd"]}, r"^studies\.learning_rate\.rates is missing"),
        (
            ["studies", "batch_size"],
            {"variant": "adam", "sizes": [10]},
            r"^studies\.batch_size\.variant must be one",
        ),
    ],
)
def test_a_mistake_is_named(path, value, message):
    parse_config(copy.deepcopy(RAW))  # without the mistake it is read
    with pytest.raises(ValueError, match=message):
        parse_config(with_value(path, value))


def test_studies_of_another_experiment_are_not_offered():
    with pytest.raises(ValueError, match=r"^unknown key studies\.lr; valid keys are: learning_rate \(default None\)$"):
        parse_config({**copy.deepcopy(PINN), "studies": {"lr": {}}})


def test_a_rate_of_a_study_that_the_optimizer_refuses_is_named(monkeypatch):
    class Timid(torch.optim.SGD):
        def __init__(self, params, lr=0.1):
            if lr > 1:
                raise ValueError(f"lr must be at most 1, got {lr}")
            super().__init__(params, lr)

    monkeypatch.setitem(components.optimizers(), "Timid", Timid)
    raw = with_value(["variants", "timid"], {"optimizer": {"name": "Timid"}})
    with pytest.raises(
        ValueError, match=r"^studies\.learning_rate: variants\.timid with lr 2: .* at most 1, got 2\.0$"
    ):
        parse_config({**raw, "studies": {"learning_rate": {"variants": ["timid"], "rates": [0.5, 2]}}})


def test_a_file_without_an_experiment_misses_it():
    with pytest.raises(ValueError, match=r"^experiment is missing$"):
        parse_config({key: value for key, value in RAW.items() if key != "experiment"})


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path, ["training.epochs=5", "seeds=0-9", "variants.fast.optimizer.lr=2e-1", "problem.activation=tanh"]
    )
    assert config.training.epochs == 5 and config.seeds == tuple(range(10)) and config.problem.activation == "tanh"
    assert config.variants["fast"].optimizer.arguments["lr"] == 0.2
    assert config.variants["plain"].optimizer.arguments["lr"] == 1e-3  # the anchor's other user is not touched
    assert list(load_config(path, ["variants=fast"]).variants) == ["fast"]
    for override, message in (
        ("training.epochs", "--set needs key=value"),
        ("training..epochs=5", "--set needs key=value"),
        ("training.epochs=[", "is not a YAML value"),
        ("training.epochs=many", "training.epochs must be an integer"),
        ("seeds.a=1", "seeds is a value, not a group"),
        ("variants=slow", "variants must be one of plain, fast, got 'slow'"),
        ("training.scheduler=", "--set training.scheduler: a value is missing: write null"),
        ("training={epochs: 1, epochs: 2}", "--set training: key 'epochs' stands twice"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(path, [override])


def test_seeds_with_leading_zeros_are_decimal(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert load_config(path, ["seeds=008"]).seeds == (8,)
    assert load_config(path, ["seeds=[008, 009, 010, 011]"]).seeds == (8, 9, 10, 11)
    with pytest.raises(ValueError, match="--set seeds is given 2 times: give it once"):
        load_config(path, ["seeds=1", "seeds=2"])


def test_an_override_leaves_what_shares_an_anchor_alone(tmp_path):
    path = write(tmp_path, "a: &same {b: {c: 1}}\nd: *same\n")
    assert read_overridden(path, ["a.b.c=2"])[0] == {"a": {"b": {"c": 2}}, "d": {"b": {"c": 1}}}


def test_an_acceleration_with_defaults_is_not_none():
    assert parse_config(with_value(["variants", "sgd", "acceleration"], {})).variants["sgd"].acceleration == {}
    assert parse_config(with_value(["variants", "sgd", "acceleration"], None)).variants["sgd"].acceleration is None


def test_named_variants_leave_out_the_studies_and_say_so(tmp_path, capsys):
    path = write(tmp_path, MINIMAL + "studies:\n  batch_size: {variant: plain, sizes: [10]}\n")
    assert load_config(path).studies.batch_size is not None and not capsys.readouterr().err
    assert load_config(path, ["variants=plain"]).studies.batch_size is None
    assert capsys.readouterr().err == "--set variants leaves out the studies of the configuration\n"
    notes = []
    assert load_config(path, ["variants=plain"], notes.append) and len(notes) == 1 and not capsys.readouterr().err


def test_runs_of_an_experiment():
    raw = with_value(["studies"], {"learning_rate": {"variants": ["sgd"], "rates": [1e-3, 1e-1], "seeds": 0}})
    raw["studies"]["batch_size"] = {"variant": "sgd", "sizes": [10, 96, 320], "steps": 64, "seeds": [0]}
    runs = expand_runs(parse_config(raw), num_rows=320)
    names = [(run.name, run.seed) for run in runs]
    assert names[:4] == [("sgd", 0), ("sgd_aadl", 0), ("sgd", 1), ("sgd_aadl", 1)]
    assert names[4:] == [(f"sgd--{end}", 0) for end in ("lr-0.001", "lr-0.1", "batch-10", "batch-96", "batch-320")]
    assert runs[5].variant.optimizer.arguments["lr"] == 0.1 and runs[5].study == "learning_rate"
    assert [run.training.epochs for run in runs[-3:]] == [2, 16, 64]  # 64 steps each; one of 96 rows has four a pass
    assert json.loads(runs[0].as_json())["training"]["epochs"] == 4
    assert len({run.as_json() for run in runs}) == len(runs)
    with pytest.raises(ValueError, match="a batch of 320 rows is larger than the training set of 300"):
        expand_runs(parse_config(raw), num_rows=300)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_configurations_of_the_suite_are_good(path):
    config = load_or_skip(path)
    assert (config.experiment, config.scale) == (path.parent.name, path.stem)


def test_paper_settings():
    config = load_config(CONFIGS / "graduate_admissions" / "laptop.yaml")
    assert config.seeds == tuple(range(10))
    sgd = config.variants["sgd_published"]
    assert sgd.optimizer.arguments == {"lr": 1e-3, "momentum": 0.9, "nesterov": True}
    published = sgd.published
    assert (published.relaxation, published.wait_iterations, published.history_depth) == (1.0, 1, 5)
    assert (published.frequency, published.store_each_nth, published.reg_acc) == (10, 1, 0.0)
    assert not published.average and not published.safeguard


def test_what_needs_a_learning_rate_is_refused_for_an_optimizer_without_one():
    raw = copy.deepcopy(PINN)
    raw["variants"] |= {name: {"optimizer": {"name": name}} for name in ("LevenbergMarquardt", "MuonAdam")}
    raw["studies"] = {"learning_rate": {"variants": ["adam", "MuonAdam"], "rates": [1e-3]}}
    muon = next(run for run in expand_runs(parse_config(raw)) if run.name == "MuonAdam--lr-0.001")
    assert muon.variant.optimizer.arguments == {"lr": 1e-3}
    raw["studies"]["learning_rate"]["variants"] = ["adam", "LevenbergMarquardt"]
    with pytest.raises(ValueError, match=r"^studies\.learning_rate: variants\.Lev\w+ must have an optimizer with"):
        parse_config(raw)
    del raw["studies"]
    raw["training"]["scheduler"] = {"name": "StepLR", "step_size": 2}
    with pytest.raises(ValueError, match=r"^variants\.Lev\w+\.training\.scheduler must be null for Lev\w+, which"):
        parse_config(raw)
    raw["variants"]["LevenbergMarquardt"]["training"] = {"scheduler": None}
    parse_config(raw)


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (["training.epochs=0"], 0),
        (["seeds=1", "training.epochs=0", "training.batch_size=0"], 1),
        (["variants.sgd.published={}", "variants.sgd.acceleration={}"], 1),  # each is right by itself
        (["variants=sgd", "variants.sgd.label=''"], 1),
        (["variants=sgdd"], 0),
    ],
)
def test_a_mistake_names_what_brings_it_in(tmp_path, overrides, culprit):
    path = write(tmp_path, yaml.safe_dump(RAW))
    with pytest.raises(ValueError, match=f"^--set {re.escape(overrides[culprit])}: "):
        load_config(path, overrides)
    write(tmp_path, yaml.safe_dump(with_value(["scale"], "../x")))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: scale must be a name"):
        load_config(path, overrides)


def test_overrides_may_mend_a_file_and_each_other(tmp_path):
    path = write(tmp_path, yaml.safe_dump({key: value for key, value in RAW.items() if key != "seeds"}))
    mending = ["seeds=1", "variants.sgd_aadl.published={}", "variants.sgd_aadl.acceleration=null"]
    load_config(path, mending)
    with pytest.raises(ValueError, match=r"^--set training\.epochs=0: training\.epochs must be"):
        load_config(path, [*mending, "training.epochs=0"])


def test_what_a_record_holds_stays_as_it_is():
    """The texts have been these since November 2026; with others, runs that are finished are made again."""
    raw = copy.deepcopy(PINN)
    raw["training"]["scheduler"] = {"name": "StepLR", "step_size": 5}
    raw["variants"] = {"plain": {"optimizer": {"name": "Adam", "betas": [0.9, 0.99]}, "published": {"relaxation": 1}}}
    raw["variants"]["own"] = {
        "optimizer": {"name": "Adam", "lr": 1e-2},
        "ema_decay": 0.9,
        "baseline": "plain",
        "problem": {"options": {"nu": 0.01}, "condition_weight": 2},
        "then": {"after": 5, "optimizer": {"name": "SGD"}, "acceleration": {"frequency": 2}},
    }
    found = [hashlib.sha256(run.as_json().encode()).hexdigest()[:16] for run in expand_runs(parse_config(raw))[:2]]
    assert found == ["7ed5e0bf996235c5", "7a28d5f058e0161f"]


def test_overrides_that_miss_a_variant_are_reported(tmp_path, capsys):
    raw = copy.deepcopy(PINN)
    for name in ("own", "second"):
        raw["variants"][name] = {
            "optimizer": {"name": "Adam"},
            "problem": {"num_points": 64, "options": {"nu": 0.01}},
            "training": {"iterations": 6},
        }
    path = write(tmp_path, json.dumps(raw))
    config = load_config(path, ["problem.num_points=16", "problem.options.nu=0.02", "training.evaluate_every=3"])
    assert config.problem.num_points == 16
    assert capsys.readouterr().err.splitlines() == [
        "--set problem.num_points: these variants keep their own problem.num_points: own, second",
        "--set problem.options.nu: these variants keep their own problem.options: own, second",
    ]
    load_config(path, ["variants=adam,second", "training.iterations=3"])
    said = "--set training.iterations: these variants keep their own training.iterations: second\n"
    assert capsys.readouterr().err == said
    load_config(path, ["variants=adam", "training.iterations=3", "seeds=0"])
    assert not capsys.readouterr().err
