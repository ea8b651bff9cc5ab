"""`list`, and the names that stand for configurations."""

import subprocess
import sys

import pytest
import yaml
from paths import ROOT
from suite_cases import RAW, load_or_skip

from experiments.__main__ import main
from experiments.commands import list as command
from experiments.records.status import states_of_folder
from experiments.runs.config import expand_runs
from experiments.settings import config_files
from experiments.settings.yaml_file import read_yaml


@pytest.fixture
def configs(plainly, tmp_path, monkeypatch):
    """A folder with two configurations of one experiment."""
    folder = tmp_path / "configs"
    (folder / "graduate_admissions").mkdir(parents=True)
    for scale in ("laptop", "paper"):
        path = folder / "graduate_admissions" / f"{scale}.yaml"
        path.write_text(yaml.safe_dump(RAW | {"scale": scale}))
    monkeypatch.setattr(config_files, "CONFIGS", folder)
    return folder


def test_the_state_of_results_is_listed(configs, tmp_path, capsys):
    results = tmp_path / "results"
    assert main(["list", "--results", str(results)]) == 0
    assert capsys.readouterr().out.count("none") == 2
    run = ["run", "graduate_admissions", "--results", str(results), "--jobs", "1", "--set"]
    assert main([*run, "variants=sgd"]) == 0  # that of the laptop
    assert main([*run, "variants=sgd", "--set", "scale=trial"]) == 0
    folder = results / "graduate_admissions" / "laptop" / "sgd_aadl"
    (folder / "seed-0.run").mkdir(parents=True)
    (folder / "seed-0.run" / "step-0000000003.pt").touch()
    (folder / "seed-1.run" / "step-0000000003").mkdir(parents=True)  # of a former version
    (folder / "seed-1.h5").write_bytes(b"killed while writing")
    capsys.readouterr()
    assert main(["list", "--results", str(results)]) == 0
    shown = capsys.readouterr().out
    assert "2 finished, 1 stopped, 1 unreadable of 4" in shown and "graduate_admissions/trial: 2 finished" in shown
    assert main(["list", "graduate_admissions/laptop", "--results", str(results)]) == 0
    of_sgd, of_aadl = capsys.readouterr().out.splitlines()[-2:]
    assert of_sgd.split() == ["sgd", "plain", "SGD", "-", "all", "2", "finished"]
    assert of_aadl.endswith("anderson  1 stopped, 1 unreadable of 2")


@pytest.mark.parametrize("name", config_files.config_files())
def test_the_runs_of_a_configuration_are_counted_as_they_are_made(name):
    path = config_files.find_config(name)
    config = load_or_skip(path)
    made = expand_runs(config, num_rows=10**6)
    listed = command.runs_of(read_yaml(path), path)
    assert sorted(listed) == sorted((run.name, run.seed) for run in made)


def test_neither_help_nor_list_waits_for_torch(tmp_path):
    script = "import sys; from experiments.__main__ import main; code = main(sys.argv[1:]); assert not code\n"
    script += "assert not {'torch', 'matplotlib'} & set(sys.modules), 'imported'"
    for arguments in (["list", "--results", str(tmp_path)], ["list", "imagenet"]):
        subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=True, capture_output=True)


def test_a_folder_without_records_has_no_states(tmp_path):
    assert states_of_folder(tmp_path / "missing") == {}


def test_a_run_that_is_made_again_is_stopped_although_it_has_a_record(tmp_path):
    (tmp_path / "sgd" / "seed-0.run").mkdir(parents=True)
    (tmp_path / "sgd" / "seed-0.run" / "step-0000000001.pt").touch()
    (tmp_path / "sgd" / "seed-0.h5").touch()
    assert states_of_folder(tmp_path) == {("sgd", 0): "stopped"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "graduate_admission",
            "one of graduate_admissions, got 'graduate_admission'; did you mean graduate_admissions?",
        ),
        ("graduate_admissions/papr", "has the configurations laptop, paper, got 'papr'; did you mean paper?"),
        ("CONFIGS/graduate_admissions/labtop.yaml", "labtop.yaml does not exist; did you mean CONFIGS/graduate_adm"),
        ("quite_another", "one of graduate_admissions, got 'quite_another'"),
    ],
)
@pytest.mark.parametrize("of", ["list", "run"])
def test_an_unknown_name_is_one_sentence(configs, capsys, of, name, message):
    assert main([of, name.replace("CONFIGS", str(configs))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message.replace("CONFIGS", str(configs)) in line
    assert ("did you mean" in line) == ("did you mean" in message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": None}, "experiment must be a text"),
        ({"variants": ["sgd"]}, "variants must be a mapping"),
        ({"variants": {"sgd": None}}, "variants.sgd must be a mapping"),
        ({"variants": {"sgd": {"acceleration": True}}}, "variants.sgd.acceleration must be a mapping"),
    ],
)
def test_a_file_of_the_wrong_shape_is_one_sentence(tmp_path, capsys, change, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"experiment": "graduate_admissions", "scale": "test", "seeds": 0} | change))
    assert main(["list", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{path}: {message}" in line
