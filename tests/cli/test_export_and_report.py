"""`export` and `report`, from made-up records."""

import csv
import errno
import io
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from pinn_records import PLAIN, save

from data_loaders.files import write_text
from experiments.__main__ import main
from experiments.records.intervals import bootstrap_interval


@pytest.fixture
def results(tmp_path):
    """Four seeds of a plain variant, and three of an accelerated one, of which one diverged."""
    folder = tmp_path / "results"
    for seed in range(4):
        save(folder, "adam", PLAIN * (1 + seed), seed)
    for seed in range(3):
        lost = seed == 2
        save(folder, "adam_aadl", PLAIN / 2 if not lost else [1.0, math.nan], seed, diverged=10 if lost else None)
    return folder


def exported(results, capsys, *options):
    capsys.readouterr()
    assert main(["export", "--results", str(results), "--csv", "-", *options]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_groups_and_their_intervals(results, capsys):
    rows = exported(results, capsys, "--metric", "metrics/train/loss")
    plain, accelerated = rows
    assert (plain["experiment"], plain["scale"], plain["variant"]) == ("burgers_2d", "test", "adam")
    assert plain["num_runs"] == "4" and float(plain["median"]) == pytest.approx(0.025)
    assert float(plain["minimum"]) == pytest.approx(0.01) and float(plain["maximum"]) == pytest.approx(0.04)
    assert 0.01 <= float(plain["low"]) <= 0.025 <= float(plain["high"]) <= 0.04
    assert float(accelerated["median"]) == pytest.approx(0.005)
    assert accelerated["maximum"] == "inf"  # the one that diverged
    assert exported(results, capsys, "--metric", "metrics/train/loss") == rows


def test_other_groups(results, capsys):
    rows = exported(results, capsys, "--group-by", "seed,variant.optimizer.name", "--metric", "metrics/train/*")
    found = [(row["seed"], row["variant.optimizer.name"], row["num_runs"]) for row in rows]
    assert found == [("0", "Adam", "2"), ("1", "Adam", "2"), ("2", "Adam", "2"), ("3", "Adam", "1")]
    assert rows[3]["low"] == "nan"  # a single run has no interval


def test_latex(results, tmp_path, capsys):
    path = tmp_path / "tables" / "table.tex"
    assert main(["export", "--results", str(results), "--latex", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text()
    rows = re.findall(r"^(.*)\\\\$", text, flags=re.MULTILINE)
    columns = len(re.search(r"begin\{tabular\}\{(l+)\}", text)[1])
    assert len(rows) == 3 and all(row.count(" & ") == columns - 1 for row in rows)
    assert r"adam\_aadl" in rows[2] and r"$\infty$" in rows[2] and "3 to 4 runs" in text


def test_the_bootstrap_agrees_with_another_one():
    values = np.random.default_rng(3).normal(size=101)
    theirs = scipy.stats.bootstrap((values,), np.median, n_resamples=10_000, method="percentile",
                                   random_state=np.random.default_rng(1)).confidence_interval  # fmt: skip
    assert bootstrap_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval(np.array([1.0, 1.0, np.inf])) == (1.0, np.inf)
    assert all(math.isnan(end) for end in bootstrap_interval(np.ones(1)))


class Page(HTMLParser):
    """What a page shows, and what it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.images, self.foreign, self.open = 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.images += tag == "img" and attributes["src"].startswith("data:image/png;base64,")
        self.foreign += [
            attributes[key] for key in ("src", "href") if not attributes.get(key, "data:").startswith("data:")
        ]
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_holds_everything(results, capsys):
    assert main(["report", "--results", str(results)]) == 0
    path = results / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text("utf-8")
    page = Page(text)
    drawn = list((results / "burgers_2d" / "test" / "figures").glob("*.png"))
    assert drawn and page.images == len(drawn) and not page.foreign and not page.open
    for shown in (
        "burgers_2d, test",
        "plain Adam",
        "accelerated",
        "evaluate_every: 10",
        "torch",
        "0-3",
        "bootstrap interval",
    ):
        assert shown in text


def test_labels_are_data(results, capsys):
    changes = {
        "variants": {"adam": {"label": "<script>&", "optimizer": {"name": "Adam", "lr": 1e-2}}},
        "baseline": "adam",
    }
    for seed in range(4):
        save(results, "adam", PLAIN, seed, changes=changes)
    assert main(["report", "--results", str(results), "--output", str(results / "a" / "b.html")]) == 0
    text = (results / "a" / "b.html").read_text("utf-8")
    assert "<script>" not in text and "&lt;script&gt;&amp;" in text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("module", ["experiments.commands.report", "experiments.records.figures"])
def test_another_folder_takes_the_place_of_a_read_only_one_and_not_of_a_full_disk(
    results, tmp_path, monkeypatch, capsys, module, number
):
    save(results, "adam", PLAIN, 0)
    monkeypatch.chdir(tmp_path)

    def write(path, *arguments, **named):
        if results in path.parents:
            raise OSError(f"{path} cannot be written: {os.strerror(number)}") from OSError(number, os.strerror(number))
        return write_text(path, *arguments, **named)

    def mkdir(path, *arguments, **named):
        if path.name == "figures" and results in path.parents:
            raise OSError(number, os.strerror(number))
        return made(path, *arguments, **named)

    made = Path.mkdir
    if module.endswith("report"):
        monkeypatch.setattr(f"{module}.write_text", write)
    else:
        monkeypatch.setattr(Path, "mkdir", mkdir)
    code = main(["report", "--results", str(results)])
    printed = capsys.readouterr().err
    if number == errno.ENOSPC:
        assert code == 2 and "No space left on device" in printed and not list(tmp_path.glob("*.html"))
    else:
        assert code == 0 and "note: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "export needs --csv FILE, --latex FILE or both"),
        (["export", "--csv", "-", "--group-by", "varient"], "got 'varient'; did you mean variant?"),
        (["export", "--csv", "-", "--group-by", "training.iteration"], "did you mean training.iterations?"),
        (["export", "--csv", "-", "--metric", "loss"], "--metric must be one of "),
        (["export", "--csv", "FOLDER"], "cannot be written: Is a directory"),
        (["report", "--only", "burgers"], "no results of burgers in "),
        (["report", "--output", "FOLDER"], "cannot be written: Is a directory"),
    ],
)
def test_a_mistake_is_one_sentence(results, capsys, arguments, message):
    named = [str(results) if argument == "FOLDER" else argument for argument in arguments]
    assert main([*named, "--results", str(results)]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and printed[0].startswith("error: ") and message in printed[0]
