"""The benchmark of the input pipeline: its data, its arithmetic, its page."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import input_pipeline as benchmark
from benchmarks.input_pipeline import Report, Times
from benchmarks.tables import REPORTS
from data_loaders.imagenet.decode import Decoder, Decoding


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return benchmark.make_forms(tmp_path_factory.mktemp("forms"), 4)


def report_of(load, floor, resized_load=1e-3):
    """A report of made-up seconds an image."""
    seconds = {
        "read folder": [2e-5],
        "read packed": [3e-5],
        "read resized": [1e-5],
        "load folder": load,
        "load packed": load,
        "load resized": [resized_load] * len(load),
        "floor packed": floor,
        "floor resized": [9e-4] * len(load),
    }
    times = {name: Times(cpu, [2 * each for each in cpu]) for name, cpu in seconds.items()}
    kilobytes = {"folder": 100.0, "packed": 100.0, "resized": 35.0}
    return Report(4, len(load), kilobytes, times, 1.5)


def test_the_images_are_like_those_of_imagenet():
    data = benchmark.natural_jpeg(0)
    image = Image.open(io.BytesIO(data))
    assert image.size == (500, 375) and image.mode == "RGB" and image.layer[0][1:3] == (2, 2)  # 4:2:0
    assert 90_000 < len(data) < 110_000
    assert data == benchmark.natural_jpeg(0) != benchmark.natural_jpeg(1)


def test_all_forms_hold_the_same_images(forms):
    assert [forms["folder"].read(index) for index in range(4)] == [forms["packed"].read(index) for index in range(4)]
    assert Image.open(io.BytesIO(forms["resized"].read(0))).size == (341, 256)
    first, second = (list(benchmark.loader_of(forms[form]).batches(0)) for form in ("folder", "packed"))
    assert torch.equal(first[0][0], second[0][0])


def test_every_case_does_its_work_on_all_images(forms, monkeypatch):
    read = []
    for form, images in forms.items():
        original = images.read
        monkeypatch.setattr(
            images, "read", lambda index, form=form, original=original: read.append((form, index)) or original(index)
        )
    cases = benchmark.cases_of(forms)
    read.clear()
    for name, case in cases.items():
        case(0)
        kind, _, form = name.partition(" ")
        expected = [(form, index) for index in range(4)] if kind in ("read", "load") else []
        assert sorted(read) == expected, name
        read.clear()
    assert {"read folder", "load packed", "load resized", "floor packed", "floor resized"} <= set(cases)


def test_floor_and_loader_work_on_the_same_images_and_crops(tmp_path, monkeypatch):
    forms = benchmark.make_forms(tmp_path, 4)
    monkeypatch.setattr(benchmark, "BATCH", 2)
    seen = []
    monkeypatch.setattr(benchmark, "floor", lambda contents, numbers: seen.append((contents, numbers)))
    cases = benchmark.cases_of(forms)
    decoder = Decoder(Decoding(benchmark.SIZE, benchmark.RESIZE))
    for step in range(2):
        cases["floor packed"](step)
        images, _ = next(benchmark.loader_of(forms["packed"]).batches(0, step))
        assert len(images) == 2
        for square, data, numbers in zip(images, *seen[step], strict=True):
            assert np.array_equal(square.permute(1, 2, 0).numpy(), decoder(data, numbers))
    assert seen[0][0] != seen[1][0]


def test_rounds_begin_with_another_case_and_the_first_pass_does_not_count(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 2)
    calls = []
    times = benchmark.measure({name: lambda step, name=name: calls.append((name, step)) for name in "abc"}, 2, 4)
    assert "".join(name for name, _ in calls) == "bcacababcbca"
    assert [step for _, step in calls] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    assert all(len(each.cpu) == len(each.wall) == 2 for each in times.values())


def test_shares_are_those_of_the_same_round():
    report = report_of(load=[2e-3, 4e-3, 1e-3], floor=[1e-3, 3e-3, 1e-3])
    assert benchmark.ratios(report, "packed") == pytest.approx([0.5, 0.75, 1.0])
    assert benchmark.ratios(report, "resized") == pytest.approx([0.9] * 3)


@pytest.mark.slow
def test_a_quick_run_puts_its_tables_into_the_page(tmp_path, capsys):
    shutil.copy(REPORTS / "input_pipeline.md", tmp_path)
    benchmark.main(["--quick", "--images", "3", "--rounds", "1", "--folder", str(tmp_path), "--docs"], tmp_path)
    page, printed = (tmp_path / "input_pipeline.md").read_text(), capsys.readouterr().out
    assert all(line in page for line in printed.splitlines() if line.startswith("|"))
    page = " ".join(page.split())
    assert "| TrainLoader |" in printed and "3 files, 1 rounds" in page and "256 files" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["input_pipeline.md"]  # the data are gone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "40"], "--images must be at most 32 or a multiple of it, whole batches, got 40"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--folder", "/no/such"], "--folder: /no/such is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err
