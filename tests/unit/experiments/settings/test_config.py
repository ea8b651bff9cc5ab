import copy
import json
import math
import re

import pytest
import yaml
from paths import CONFIGS
from suite_cases import PINN, RAW, load_or_skip

from experiments.catalog import load_config, parse_config
from experiments.runs.config import expand_runs


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


def test_a_number_without_a_point_is_a_number(tmp_path):
    rate = load_config(write(tmp_path, MINIMAL)).variants["plain"].optimizer.arguments["lr"]
    assert isinstance(rate, float) and rate == 1e-3
    with pytest.raises(ValueError, match=r"variants\.plain\.optimizer: lr must be a number, got '1e-3'"):
        load_config(write(tmp_path, MINIMAL.replace("lr: 1e-3", "lr: '1e-3'")))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["epochs"], 5, r"^unknown key epochs; valid keys are: experiment, scale, seeds, problem, training"),
        (["training", "epoch"], 5, r"^unknown key training\.epoch; .*epochs \(default 100\).*; did you mean epochs\?$"),
        (["training", "epochs"], 0, r"^training\.epochs must be greater than or equal to 1, got 0"),
        (["training"], [1], r"^training must be a mapping of settings, got \[1\]"),
        (["training", "scheduler"], {"name": "StepLr"}, r"^training\.scheduler: name must be one of .*StepLR"),
        (["training", "scheduler"], {"name": "StepLR"}, r"^training\.scheduler: .*step_size"),
        (["training", "scheduler"], {"name": "ReduceLROnPlateau"}, r"^training\.scheduler: .*metrics"),
        (["training", "scheduler"], {"name": "StepLR", "step_size": "abc"}, r"^training\.scheduler: "),
        (["training", "scheduler"], {"name": "StepLR", "step_size": 0}, r"^training\.scheduler: "),
        (
            ["training", "scheduler"],
            {"name": "StepLR", "step": 1},
            r"^unknown key training\.scheduler\.step; .*step_size",
        ),
        (["problem", "split_seed"], 2**32, r"^problem\.split_seed must be less than 4294967296"),
        (["problem", "validation_fraction"], 1.0, r"^problem\.validation_fraction must be less than 1, got 1\.0"),
        (["problem", "activation"], "relus", r"^problem\.activation must be one of tanh, .*; did you mean relu\?$"),
        (["experiment"], "graduate", r"one of graduate_admissions, burgers_2d, .*, got 'graduate'"),
        (["experiment"], None, r"^experiment must be a text, got None"),
        (["scale"], "../x", r"^scale must be a name"),
        (["seeds"], [0, 0], r"^seeds must have no entry twice"),
        (["variants"], {}, r"^variants must have at least 1 item, got {}"),
        (["variants", "a b"], {"optimizer": {"name": "SGD"}}, r"^a name in variants must be a name"),
        (["variants", "sgd", "optimiser"], {}, r"^unknown key variants\.sgd\.optimiser; valid keys are: label"),
        (["variants", "sgd", "then"], {"optimizer": {"name": "SGD"}, "after": 1}, r"^unknown key variants\.sgd\.then"),
        (["variants", "sgd", "optimizer"], None, r"^variants\.sgd\.optimizer must be a mapping with a name"),
        (
            ["variants", "sgd", "optimizer", "name"],
            "Sgd",
            r"^variants\.sgd\.optimizer: name must be one of .*, got 'Sgd'",
        ),
        (["variants", "sgd", "optimizer", "rate"], 1, r"^unknown key variants\.sgd\.optimizer\.rate; .*lr \(default"),
        (["variants", "sgd", "optimizer", "lr"], True, r"optimizer: lr must be a number, got True"),
        (["variants", "sgd", "optimizer", "lr"], math.nan, r"optimizer: lr must be finite, got nan"),
        (["variants", "sgd", "optimizer", "lr"], -1.0, r"^variants\.sgd\.optimizer: Invalid learning rate"),
        (["variants", "sgd", "ema_decay"], 1.0, r"^variants\.sgd\.ema_decay must be less than 1, got 1\.0"),
        (["variants", "sgd_aadl", "acceleration", "depth"], 3, r"acceleration\.depth; valid .*history_depth \(default"),
        (["variants", "sgd_aadl", "acceleration", "process_group"], 3, r"unknown key .*process_group"),
        (["variants", "sgd_aadl", "acceleration", "relaxation"], 2.0, r"variants\.sgd_aadl\.acceleration: relaxation"),
        (["variants", "sgd_aadl", "acceleration", "history_dtype"], "int8", r"acceleration: history_dtype"),
        (
            ["variants", "sgd_aadl", "published"],
            {},
            r"^variants\.sgd_aadl: acceleration and published exclude each other",
        ),
        (
            ["variants", "sgd", "published"],
            {"history_depth": 2},
            r"published\.history_depth must be greater than or equal",
        ),
        (["variants", "sgd", "published"], {"frequency": 0}, r"published\.frequency must be an integer >= 1, got 0"),
        (["baseline"], "adam", r"^baseline must be one of sgd, sgd_aadl, got 'adam'"),
        (["studies", "rates"], {}, r"^unknown key studies\.rates; valid keys are: learning_rate"),
        (["studies", "learning_rate"], {"variants": ["sgd"]}, r"^studies\.learning_rate\.rates is missing"),
        (
            ["studies", "batch_size"],
            {"variant": "adam", "sizes": [10]},
            r"^studies\.batch_size\.variant must be one of sgd, sgd_aadl, got 'adam'",
        ),
    ],
)
def test_a_mistake_is_named(path, value, message):
    parse_config(copy.deepcopy(RAW))  # without the mistake it is read
    with pytest.raises(ValueError, match=message):
        parse_config(with_value(path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("scale: a\nscale: b", r"key 'scale' stands twice in one mapping \(line 2\)"),
        ("scale: a", "experiment must be a text, got None"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"config\.yaml.*" + message):
        load_config(write(tmp_path, text))


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


def test_an_acceleration_without_its_settings_is_refused(tmp_path):
    text = MINIMAL + "    acceleration:\n      # relaxation: 0.5\n"
    with pytest.raises(ValueError, match=r"nothing stands after the key 'acceleration' \(line 11\): write \{\}"):
        load_config(write(tmp_path, text))
    assert (
        load_config(write(tmp_path, text.replace("acceleration:", "acceleration: {}"))).variants["fast"].acceleration
        == {}
    )
    assert (
        load_config(write(tmp_path, text.replace("acceleration:", "acceleration: null"))).variants["fast"].acceleration
        is None
    )


def test_named_variants_leave_out_the_studies_and_say_so(tmp_path, capsys):
    path = write(tmp_path, MINIMAL + "studies:\n  batch_size: {variant: plain, sizes: [10]}\n")
    assert load_config(path).studies.batch_size is not None and not capsys.readouterr().err
    assert load_config(path, ["variants=plain"]).studies.batch_size is None
    assert capsys.readouterr().err == "--set variants leaves out the studies of the configuration\n"


def test_runs_of_an_experiment():
    raw = with_value(["studies"], {"learning_rate": {"variants": ["sgd"], "rates": [1e-3, 1e-1], "seeds": 0}})
    raw["studies"]["batch_size"] = {"variant": "sgd", "sizes": [10, 320], "steps": 64, "seeds": [0]}
    runs = expand_runs(parse_config(raw), num_rows=320)
    names = [(run.name, run.seed) for run in runs]
    assert names[:4] == [("sgd", 0), ("sgd_aadl", 0), ("sgd", 1), ("sgd_aadl", 1)]
    assert names[4:] == [(f"sgd--{end}", 0) for end in ("lr-0.001", "lr-0.1", "batch-10", "batch-320")]
    assert runs[5].variant.optimizer.arguments["lr"] == 0.1 and runs[5].study == "learning_rate"
    assert [run.training.epochs for run in runs[-2:]] == [2, 64]  # 64 steps each
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


def test_a_study_of_an_optimizer_without_a_learning_rate_is_refused():
    raw = copy.deepcopy(PINN)
    raw["variants"]["lm"] = {"optimizer": {"name": "LevenbergMarquardt"}}
    raw["variants"]["muon"] = {"optimizer": {"name": "MuonAdam"}}
    raw["studies"] = {"learning_rate": {"variants": ["adam", "muon"], "rates": [1e-3]}}
    (muon,) = (run for run in expand_runs(parse_config(raw)) if run.name == "muon--lr-0.001" and run.seed == 0)
    assert muon.variant.optimizer.arguments == {"lr": 1e-3}
    raw["studies"]["learning_rate"]["variants"] = ["adam", "lm"]
    with pytest.raises(ValueError) as caught:
        parse_config(raw)
    expected = "variants.lm must have an optimizer with a learning rate lr, got LevenbergMarquardt"
    assert str(caught.value) == f"studies.learning_rate: {expected}"


def test_a_scheduler_of_an_optimizer_without_a_learning_rate_is_refused():
    raw = copy.deepcopy(PINN)
    raw["training"]["scheduler"] = {"name": "StepLR", "step_size": 2}
    parse_config(raw)
    raw["variants"]["lm"] = {"optimizer": {"name": "LevenbergMarquardt"}}
    message = r"variants\.lm\.training\.scheduler must be null for LevenbergMarquardt, which has no learning rate"
    with pytest.raises(ValueError, match=message):
        parse_config(raw)
    raw["variants"]["lm"]["training"] = {"scheduler": None}
    parse_config(raw)


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["training.epochs=0"], "--set training.epochs=0: training.epochs must be"),
        (["seeds=1", "training.epochs=0"], "--set training.epochs=0: training.epochs must be"),
        (["training.epochs=0", "training.batch_size=0"], "--set training.epochs=0: training.epochs must be"),
        (["variants.sgd_aadl.published={}", "variants.sgd_aadl.acceleration=null"], ""),
        (["variants=sgdd"], "--set variants=sgdd: variants must be one of sgd, sgd_aadl, got 'sgdd'"),
    ],
)
def test_a_mistake_of_an_override_names_it(tmp_path, overrides, blamed):
    path = write(tmp_path, yaml.safe_dump(RAW))
    if not blamed:
        load_config(path, overrides)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(blamed)}"):
        load_config(path, overrides)
    broken = write(tmp_path, yaml.safe_dump(with_value(["scale"], "../x")))
    with pytest.raises(ValueError, match=f"^{re.escape(str(broken))}: "):
        load_config(broken, overrides)


def test_overrides_that_miss_a_variant_are_told(tmp_path, capsys):
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
    assert capsys.readouterr().err == (
        "--set training.iterations: these variants keep their own training.iterations: second\n"
    )
    load_config(path, ["variants=adam", "training.iterations=3", "seeds=0"])
    assert not capsys.readouterr().err
