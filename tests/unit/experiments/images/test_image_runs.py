"""Runs of image classification by the command: records, figures, tables, broken images, ranks."""

import functools
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from image_runs import AADL, image_run, image_set, raw_config
from PIL import Image
from suite_cases import build

from experiments.__main__ import main
from experiments.distributed.ranks import Ranks
from experiments.images.tables import cost_shares
from experiments.records.compare import Variant
from experiments.records.reading import Run, read_run

TOP1 = "metrics/validation/top1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "set")


def run(raw, tmp_path, *options):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return main(["run", str(path), "--results", str(tmp_path / "results"), "--jobs", "1", *options])


def test_a_run_is_recorded_drawn_and_summarized(folder, tmp_path, capsys):
    raw = raw_config(folder, {"acceleration": AADL, "label": "aadl"})
    raw["variants"] = {"plain": {"optimizer": raw["variants"]["one"]["optimizer"], "label": "SGD"}, **raw["variants"]}
    assert run(raw, tmp_path) == 0
    with h5py.File(tmp_path / "results/imagenet/test/one/seed-0.h5") as file:
        assert file["metrics/validation/top1"].shape == (3,) and file.attrs["complete"]
        assert file["timing/images_per_second"].attrs["units"] == "s-1"
        assert "stale statistics" in file["metrics/validation/stale_top1"].attrs["long_name"]
        assert "cross entropy" in file["metrics/validation/stale_loss"].attrs["long_name"]
        seconds = {
            name: file[f"timing/{name}_seconds"][-1] for name in ("training", "acceleration", "input", "evaluation")
        }
        assert 0 < seconds["acceleration"] < seconds["training"] and 0 < seconds["input"] < seconds["training"]
        assert seconds["evaluation"] > file["timing/batchnorm_seconds"][-1] > 0
        assert file.attrs["batch_images"] == 16 and file.attrs["num_train_images"] == 48
    capsys.readouterr()
    assert main(["figures", "--results", str(tmp_path / "results")]) == 0
    drawn = {line.rpartition("/")[2] for line in capsys.readouterr().out.split()}
    assert drawn == {"validation.png", "cost.png", "statistics.png", "acceleration.png"}
    for path in (tmp_path / "results").rglob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] > 300
    assert main(["summarize", "--results", str(tmp_path / "results")]) == 0
    table = capsys.readouterr().out
    assert "top-1 (%)" in table and "20 validation images" in table and "batches of 16" in table


def test_shares_of_the_time_add_up():
    seconds = {"training": [0.0, 8.0], "acceleration": [0.0, 1.0], "input": [0.0, 2.0], "evaluation": [0.5, 2.0]}
    series = {f"timing/{name}_seconds": np.array(values) for name, values in seconds.items()}
    shares = cost_shares(Variant("one", {0: Run(Path("a.h5"), {}, {}, series, np.arange(2))}))
    assert {name: values.tolist() for name, values in shares.items()} == {
        "network": [0.5], "acceleration": [0.1], "input": [0.2], "evaluation": [0.2]
    }  # fmt: skip


@pytest.mark.parametrize(
    "setting",
    [
        {"accumulate": 2},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"precision": "float16"}, {"compile": True})),
    ],
)
def test_a_run_learns_with_each_switch(folder, tmp_path, monkeypatch, setting):
    backend = functools.partial(torch.compile, backend="eager")  # code is another package's business
    monkeypatch.setattr(torch, "compile", backend)
    raw = raw_config(folder, {"acceleration": AADL, "ema_decay": 0.5}, training={"epochs": 6} | setting)
    assert run(raw, tmp_path) == 0
    record = read_run(tmp_path / "results/imagenet/test/one/seed-0.h5")
    losses = record.series["metrics/train/minibatch_loss"]
    assert losses[-1] < losses[1] and record.series["acceleration/attempts"][-1] > 0
    assert ("metrics/skipped_steps" in record.series) == ("precision" in setting)


def test_images_that_an_earlier_process_could_not_read_are_counted(tmp_path):
    folder = image_set(tmp_path / "set")
    broken = sorted((folder / "train").rglob("*.JPEG"))[3]
    content = broken.read_bytes()
    broken.write_bytes(b"")
    problem = build(image_run(folder), Ranks())
    for _ in problem.batches(1, 0):
        pass
    state = problem.state()
    broken.write_bytes(content)
    again = build(image_run(folder), Ranks())
    assert again.finish(again.model)["num_unreadable_train_images"] == 0
    assert again.restore(state) is None
    assert again.finish(again.model)["num_unreadable_train_images"] == 1


def test_a_validation_may_be_left_out_but_for_the_last(folder, tmp_path):
    assert run(raw_config(folder, training={"epochs": 3, "evaluate_every": 2}), tmp_path) == 0
    with h5py.File(tmp_path / "results/imagenet/test/one/seed-0.h5") as file:
        assert np.isfinite(file["metrics/validation/top1"][:]).tolist() == [True, False, True, True]
        assert np.isfinite(file["metrics/train/minibatch_loss"][:]).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("problem", "training", "message"),
    [
        ({"data_path": "MISSING"}, {}, "MISSING"),
        ({}, {"batch_size": 64}, "batch_size 64 is larger than the set, which has 48 images"),
        ({}, {"sync_batchnorm": True}, "sync_batchnorm must be false on CPUs"),
        ({}, {"accumulate": 3}, "must be a multiple of ranks times accumulate, 1 x 3, got 16"),
        ({"decoder": "dali"}, {}, "problem.decoder must be one of pillow, torchvision, got 'dali'"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_training(folder, tmp_path, capsys, problem, training, message):
    assert run(raw_config(folder, problem=problem, training=training), tmp_path) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(printed) == 1 and message in printed[0]
    assert not list((tmp_path / "results").rglob("*.h5"))


def test_an_image_that_stops_the_run_is_named_in_one_sentence(tmp_path, capsys):
    folder = image_set(tmp_path / "set")
    (folder / "train" / "fractal_0002" / "fractal_0002_00003.JPEG").write_bytes(b"")
    assert run(raw_config(folder, problem={"on_unreadable": "stop"}), tmp_path) == 1
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error")]
    assert "image 27 (fractal_0002/fractal_0002_00003.JPEG) cannot be read: it is empty" in line
    assert "Traceback" not in printed
    assert run(raw_config(folder), tmp_path) == 0
    with h5py.File(tmp_path / "results/imagenet/test/one/seed-0.h5") as file:
        assert file.attrs["num_unreadable_train_images"] == 1 and file.attrs["num_unreadable_validation_images"] == 0


def write_colors(folder):
    """Four classes of one color each, light and dark: what any network learns in a few epochs."""
    light = np.random.RandomState(0)
    for split, count in (("train", 40), ("val", 15)):
        for name, color in {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "gray": (0.6, 0.6, 0.6)}.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = np.full((24, 24, 3), light.uniform(100, 250) * np.array(color)).astype(np.uint8)
                Image.fromarray(image).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.slow
def test_two_ranks_learn(tmp_path, capfd):
    """The command starts torchrun itself; four classes, 25 % by chance with a loss of log 4."""
    raw = raw_config(write_colors(tmp_path / "set"), training={"epochs": 4, "warmup_epochs": 1.0})
    assert run(raw | {"num_ranks": 2}, tmp_path) == 0
    record = read_run(tmp_path / "results/imagenet/test/one/seed-0.h5")
    assert record.attributes["world_size"] == 2 and record.attributes["launcher"] == "torchrun"
    assert record.series[TOP1][-1] > 0.9 and record.series["metrics/validation/loss"][-1] < math.log(4) / 4
    assert "images/s" in capfd.readouterr().err
