"""data_loaders.fractals.sets: what is drawn, how it is written and taken up, and that a network learns it."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from benchmarks.fractals import Task, learn, main, own_class_is_nearest
from data_loaders.fractals import sets as fractals
from data_loaders.fractals.__main__ import main as command
from data_loaders.fractals.drawing import (
    CONTRACTION,
    FILLED,
    LARGEST_PROBABILITY,
    OVERLAP,
    SIZES,
    USUAL,
    attractor,
    circle,
    class_system,
    complex_maps,
    count,
    draw,
    num_points,
    perturbed,
    random_generator,
)
from data_loaders.fractals.sets import VALIDATION, Settings, class_names, ensure
from data_loaders.imagenet.packed import PackedImages

SMALL = Settings(num_classes=3, images_per_class=5, validation_per_class=2, size=16)
MEANS = [[67.1, 109.8, 75.6], [80.7, 58.6, 53.6], [48.0, 114.3, 105.6]]


def make(folder, settings=SMALL, **changes):
    return ensure(folder, replace(settings, **changes), num_workers=1)


def images_of(folder):
    """Names and files of a set in their order."""
    sets = [PackedImages(folder, split) for split in ("train", "validation")]
    return [(images.name(index), images.read(index)) for images in sets for index in range(len(images))]


def state_of(folder):
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_maps_are_those_of_the_matrices():
    system = class_system(0, 1)
    z = complex(0.3, -0.7)
    for i, (a, b, c) in enumerate(complex_maps(system).T):
        rotations = [
            np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in (system.first[i], system.second[i])
        ]
        matrix = rotations[0] @ np.diag(system.stretch[i]) @ rotations[1]
        x, y = matrix @ [z.real, z.imag]
        assert a * z + b * z.conjugate() + c == pytest.approx(complex(x, y) + system.shift[i], abs=1e-6)
        assert abs(np.linalg.det(matrix)) / np.abs(system.stretch.prod(1)).sum() == pytest.approx(
            system.probabilities[i]
        )


def chaos_game(system, number, random, chains=1024):
    """`number` points by random walks, many side by side; the first 16 steps only lead onto the attractor."""
    maps, ends = complex_maps(system), np.cumsum(system.probabilities)
    ends[-1] = 1.0
    points, visited = np.zeros(chains, np.complex64), []
    for _ in range(16 + number // chains):
        a, b, c = maps.take(ends.searchsorted(random.random_sample(chains), side="right"), axis=1)
        points = a * points + b * points.conj() + c
        visited.append(points)
    return np.concatenate(visited[16:])


def test_expansion_has_the_density_of_the_chaos_game_and_other_systems_have_not():
    def density(points, center, radius):
        counts = count((points - center) * (8 / radius), 16)
        return counts / counts.sum()

    for index in range(4):
        system, other = class_system(0, index), class_system(0, index + 1)
        center, radius = circle(attractor(system, 4096))
        walked = density(chaos_game(system, 1 << 16, np.random.RandomState(0)), center, radius)
        expanded = density(attractor(system, 1 << 14), center, radius)
        assert np.abs(walked - expanded).sum() < 0.06
        assert np.abs(walked - density(attractor(other, 1 << 14), center, radius)).sum() > 0.3


def test_classes_keep_their_criteria():
    for index in range(30):
        system = class_system(5, index)
        assert 3 <= len(system.shift) <= 8
        assert np.abs(system.stretch).max() < 1
        assert system.probabilities.max() <= LARGEST_PROBABILITY
        assert OVERLAP[0] <= np.abs(system.stretch.prod(1)).sum() <= OVERLAP[1]
        center, radius = circle(points := attractor(system, 4096))
        assert FILLED[0] <= (count((points - center) * (16 / radius), 32) > 0).mean() <= FILLED[1]


def test_classes_differ():
    assert own_class_is_nearest(100) > 0.9


def test_a_variation_times_a_factor_moves_the_images_of_a_class_apart():
    assert USUAL.times(1.0) == USUAL
    half, twice = USUAL.times(0.5), USUAL.times(2.0)
    assert half[:4] == tuple(each / 2 for each in USUAL[:4]) and twice.wave == 2 * USUAL.wave
    assert half.scale == pytest.approx((0.6875, 0.9625)) and twice.scale == pytest.approx((0.275, 1.375))
    assert twice.background[0] == 0.0 and twice.contrast[0] == 0.02  # colors stay colors, figures stay visible
    images = np.array([[draw(0, 0, i, 16, USUAL.times(f)) for i in range(30)] for f in (0.1, 1.0, 2.0)], dtype=float)
    spread = images.var(axis=1).mean(axis=(1, 2, 3))
    assert spread[0] < spread[1] < spread[2]


def test_the_strongest_perturbation_still_contracts():
    system = perturbed(class_system(0, 0), np.random.RandomState(0), USUAL._replace(stretch=5.0))
    assert np.abs(system.stretch).max() == CONTRACTION
    assert np.isfinite(attractor(system, 4096)).all()


def test_count_is_a_histogram_without_what_lies_outside():
    random = np.random.RandomState(0)
    x, y = random.uniform(-12, 12, (2, 5000)).astype(np.float32)
    edges = np.arange(-8, 9)
    expected = np.histogram2d(y[(y < 8) & (x < 8)], x[(y < 8) & (x < 8)], bins=(edges, edges))[0]
    np.testing.assert_array_equal(count(x + 1j * y, 16), expected)
    assert 0 < expected.sum() < 5000


def test_an_image_depends_on_seed_class_and_instance_alone():
    first = draw(3, 2, 1, 24)
    assert first.shape == (24, 24, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    class_system.cache_clear()
    np.random.seed(7)
    draw(3, 9, 9, 24)
    np.testing.assert_array_equal(draw(3, 2, 1, 24), first)
    for other in ((4, 2, 1), (3, 1, 1), (3, 2, 2), (3, 2, VALIDATION + 1), (2, 3, 1)):
        assert np.abs(draw(*other, 24).astype(int) - first).mean() > 5


def test_the_numbers_of_a_class_and_of_its_instances_are_independent():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 0, VALIDATION)]
    assert len({tuple(random_generator(*key).uniform(size=2)) for key in keys}) == len(keys)


def test_pictures_are_those_of_this_version():
    """Where this fails on purpose, raise VERSION: folders made before hold other pictures."""
    means = np.stack([draw(0, index, 0, 32) for index in range(3)]).mean(axis=(1, 2))
    assert means == pytest.approx(np.array(MEANS), abs=0.5)


def test_points_grow_with_the_picture():
    assert [num_points(size) for size in (8, 32, 64, 224)] == [2048, 2048, 8192, 131072]


def test_class_names_are_in_alphabetical_order():
    assert class_names(2) == ("fractal_0000", "fractal_0001")
    names = class_names(10_001)
    assert list(names) == sorted(names) and len(set(names)) == 10_001


# ---- how it is written -----------------------------------------------------------------------------------------------


def test_shards_hold_what_is_drawn_in_turns_of_the_classes(tmp_path):
    folder = make(tmp_path / "set", seed=4, quality=95, variation=2.0)
    settings = json.loads((folder / "fractals.json").read_text())
    assert settings["complete"] and settings["quality"] == 95 and settings["seed"] == 4
    for split, number, first in (("train", 15, 0), ("validation", 6, VALIDATION)):
        images = PackedImages(folder, split)
        assert len(images) == number and images.class_names == class_names(3)
        assert images.labels.tolist() == [0, 1, 2] * (number // 3)
        assert images.name(4) == "fractal_0001/fractal_0001_00001.JPEG"
        with Image.open(io.BytesIO(images.read(4))) as image:
            assert (image.format, image.size) == ("JPEG", (16, 16))
            shown = np.asarray(image).astype(int)
        assert np.abs(shown - draw(4, 1, first + 1, 16, USUAL.times(2.0))).mean() < 12
        assert np.abs(shown - draw(4, 1, first, 16, USUAL.times(2.0))).mean() > 12
        assert np.abs(shown - draw(4, 1, first + 1, 16)).mean() > 12


def test_worker_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fractals, "IMAGES_PER_SHARD", 6)
    two = ensure(tmp_path / "two", SMALL, num_workers=2)
    assert len(list(two.glob("train-*.h5"))) == 3
    one = images_of(make(tmp_path / "one"))
    assert images_of(two) == one and images_of(make(tmp_path / "other", seed=1)) != one


def test_neither_split_changes_with_the_other_or_with_more_classes(tmp_path):
    small = images_of(make(tmp_path / "small"))
    large = images_of(make(tmp_path / "large", num_classes=4, images_per_class=6))
    assert set(small[:15]) <= set(large[:24]) and not set(small[:15]) & set(large[24:])
    large = images_of(make(tmp_path / "other", num_classes=4, validation_per_class=3))
    assert set(small[15:]) <= set(large[20:])


def test_a_complete_set_is_left_alone(tmp_path, monkeypatch):
    target = make(tmp_path / "set")
    before = state_of(target)
    monkeypatch.setattr(fractals, "draw", lambda *_: pytest.fail("drawn again"))
    assert make(target) == target and state_of(target) == before


def test_an_interrupted_set_is_taken_up(tmp_path, monkeypatch):
    whole = images_of(make(tmp_path / "whole"))
    drawn = []

    def draw_until(last):
        def interrupted(*arguments):
            if len(drawn) == last:
                raise KeyboardInterrupt
            drawn.append(arguments)
            return draw(*arguments)

        return interrupted

    monkeypatch.setattr(fractals, "draw", draw_until(17))  # within the validation set
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set")
    assert not json.loads((tmp_path / "set" / "fractals.json").read_text())["complete"]
    assert not list((tmp_path / "set").glob("*.tmp"))
    with pytest.raises(ValueError, match="made with seed 0, not 1"):
        make(tmp_path / "set", seed=1)
    monkeypatch.setattr(fractals, "draw", draw_until(None))
    assert images_of(make(tmp_path / "set")) == whole
    assert len(drawn) == 17 + 6  # the validation set again, the training set not


def test_two_processes_may_make_a_set_at_once(tmp_path):
    command = [sys.executable, "-m", "data_loaders.fractals", str(tmp_path / "set"), "--workers", "1"]
    command += ["--classes", "3", "--images", "60", "--validation", "10", "--size", "32"]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 0, error
    alone = make(tmp_path / "alone", images_per_class=60, validation_per_class=10, size=32)
    assert images_of(tmp_path / "set") == images_of(alone)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 0),
        ("images_per_class", 0),
        ("validation_per_class", 0),
        ("size", SIZES[0] - 1),
        ("size", SIZES[1] + 1),
        ("size", 32.0),
        ("seed", -1),
        ("quality", 0),
        ("quality", 101),
        ("num_classes", True),
        ("variation", 0.0),
        ("variation", 2.5),
        ("variation", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an? (integer|number) in .*, got {value}$"):
        replace(SMALL, **{name: value})


def test_a_number_of_workers_out_of_range_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"^num_workers must be an integer in \[1, 4096\], got 0$"):
        ensure(tmp_path / "set", SMALL, num_workers=0)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("change", [{"num_classes": 4}, {"size": 17}, {"quality": 91}, {"variation": 2.0}])
def test_another_set_is_not_mixed_in(tmp_path, change):
    target = make(tmp_path / "set")
    before = state_of(target)
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"made with {name} {getattr(SMALL, name)}, not {value}"):
        make(target, **change)
    assert state_of(target) == before


@pytest.mark.parametrize(("old", "new"), [('"version": 1', '"version": 0'), ('"packed": true', '"packed": false')])
def test_sets_of_other_versions_are_refused(tmp_path, old, new):
    settings = make(tmp_path / "set") / "fractals.json"
    assert old in settings.read_text()
    settings.write_text(settings.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"set was made (with version 0, not 1|by an earlier version of .*): "):
        make(tmp_path / "set")


def test_a_set_that_an_earlier_version_began_is_refused(tmp_path, monkeypatch):
    settings = make(tmp_path / "set") / "fractals.json"
    settings.write_text(settings.read_text().replace('"complete": true', '"complete": false'))
    monkeypatch.setattr(fractals, "IMAGES_PER_SHARD", 6)  # as if another writer had made the shards
    with pytest.raises(ValueError, match=r"set was made by an earlier version .*: name another folder, or delete it$"):
        make(tmp_path / "set")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"complete": "', "\N{SNOWMAN}"])
def test_a_file_that_holds_no_settings_is_named(tmp_path, content):
    (tmp_path / "fractals.json").write_text(content, "utf-16")
    with pytest.raises(ValueError, match=r"fractals\.json does not hold the settings"):
        make(tmp_path)


def test_folders_with_other_files_and_files_are_refused(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has files but no fractals\.json"):
        make(tmp_path)
    with pytest.raises(ValueError, match=r"holiday\.png is not a folder"):
        make(tmp_path / "holiday.png")


def test_a_set_that_another_process_is_about_to_begin_is_not_refused(tmp_path):
    for name in (fractals.LOCK, ".fractals.json.0123.partial"):
        (tmp_path / name).write_bytes(b"")
    assert json.loads((make(tmp_path) / "fractals.json").read_text())["complete"]


def test_the_command_explains_mistakes_in_one_sentence(tmp_path, capsys):
    assert command([str(tmp_path / "set"), "--size", "4"]) == 2
    error = capsys.readouterr().err
    assert error == "error: size must be an integer in [8, 2048], got 4\n"
    arguments = ["--classes", "2", "--images", "2", "--validation", "1", "--size", "16", "--workers", "1"]
    assert command([str(tmp_path / "set"), *arguments]) == 0
    assert len(PackedImages(tmp_path / "set", "train")) == 4


# ---- a network learns it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_learns_easy_fractals_and_no_shuffled_labels():
    task = Task(classes=4, images=60, validation=40, size=24, epochs=6, variation=USUAL.times(0.5))
    assert max(learn(task, 0)) > 0.6
    assert max(learn(replace(task, shuffled=True), 0)[-2:]) < 0.45


@pytest.mark.slow
def test_the_benchmark_prints_its_page(capsys):
    main(["--quick"])
    page = capsys.readouterr().out
    assert "| 224 | 131,072 |" in page and "| a small task |" in page
