"""Studies of scaling: a job for each number of nodes, and what their records say."""

import itertools
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from suite_cases import problem, result, run_config

from experiments.catalog import load_config
from experiments.distributed.ranks import Ranks
from experiments.records.reading import Run
from experiments.records.status import run_path
from experiments.records.writing import write_run
from jobs import scaling

CONFIG = ROOT / "experiments" / "configs" / "graduate_admissions" / "laptop.yaml"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ARGUMENTS = [str(CONFIG), "--site", "frontier", "--account", "ABC123", "--time", "2:00:00", "--results"]


def study(tmp_path, mode, *more, nodes="1,2,4"):
    return scaling.main([*ARGUMENTS, str(tmp_path), "--dry-run", "--mode", mode, "--nodes", nodes, *more])


def test_a_study_has_one_job_a_number_of_nodes(tmp_path, capsys):
    assert study(tmp_path, "weak") == 0
    text = capsys.readouterr().out
    found = [line for line in text.splitlines() if "--nodes=" in line and "SBATCH" in line]
    assert found == [f"#SBATCH --nodes={number}" for number in (1, 2, 4)]
    assert "training.batch_size=40 " in text.replace("\n", " ") and "training.batch_size=160" in text
    assert f"{tmp_path}/scaling/weak/nodes-4" in text
    assert study(tmp_path, "strong") == 0
    assert "batch_size" not in capsys.readouterr().out


@pytest.mark.parametrize("nodes", ["", "2,1", "1,1", "0,1", "1,two"])
def test_numbers_of_nodes_are_checked(tmp_path, capsys, nodes):
    assert scaling.main([*ARGUMENTS, str(tmp_path), "--mode", "weak", f"--nodes={nodes}"]) == 2
    assert "--nodes must be rising integers" in capsys.readouterr().err


def test_a_study_is_no_work_for_a_debug_queue(tmp_path, capsys):
    assert study(tmp_path, "strong", "--queue", "debug") == 2
    assert "--nodes must be one number in queue debug of frontier, which takes no series" in capsys.readouterr().err


def test_weak_scaling_needs_multiples(tmp_path, capsys):
    assert study(tmp_path, "weak", nodes="2,3") == 2
    assert "must be multiples of the smallest number" in capsys.readouterr().err


def test_points_of_physics_informed_networks_grow_with_the_ranks():
    config = load_config(ROOT / "experiments" / "configs" / "burgers_2d" / "laptop.yaml")
    points, conditions = config.problem.num_points, config.problem.num_conditions
    assert scaling.work_overrides(config, "weak", 8, 2) == [
        f"problem.num_points={4 * points}",
        f"problem.num_conditions={4 * conditions}",
    ]
    assert scaling.work_overrides(config, "strong", 8, 2) == []


def test_a_batch_for_each_rank_stays_or_becomes_that_of_the_smallest_job():
    config = load_config(ROOT / "experiments" / "configs" / "imagenet" / "paper.yaml")
    whole = 6 * config.training.batch_size_per_rank
    assert scaling.work_overrides(config, "weak", 12, 6) == []
    strong = [f"training.batch_size={whole}", "training.batch_size_per_rank=null"]
    assert scaling.work_overrides(config, "strong", 12, 6) == strong


def test_collecting_gives_rates_efficiencies_and_a_figure(tmp_path, capsys):
    """Twice the ranks in 0.625 of the time: efficiency 80 %."""
    for (nodes, ranks, seconds), seed in itertools.product([(1, 8, 10.0), (2, 16, 6.25)], (0, 1)):
        folder = scaling.folder_of(tmp_path, "strong", nodes)
        ranks_of = Ranks(0, ranks)
        run = run_config(seed=seed, epochs=4)
        path = run_path(folder, run)
        write_run(path, run, problem(), result([1.0] * 5, seconds_per_epoch=seconds), ranks_of, START, START)
    run = run_config(seed=2, epochs=4)
    lost = result([1.0, np.nan, np.nan, np.nan, np.nan], seconds_per_epoch=0.1, diverged_epoch=1)
    write_run(run_path(folder, run), run, problem(), lost, ranks_of, START, START)  # its rate is none
    assert [len(point.rates) for curve in scaling.read_curves(tmp_path).values() for point in curve] == [2, 2]
    assert scaling.main(["collect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| strong")]
    shown = [[row[column].strip() for column in (3, 6, 7)] for row in rows]
    assert shown == [["8", "1.00", "100 %"], ["16", "1.60", "80 %"]]
    assert (tmp_path / "scaling" / "strong.png").exists() and not (tmp_path / "scaling" / "weak.png").exists()
    assert (tmp_path / "scaling" / "scaling.md").read_text() in printed


@pytest.mark.parametrize(("seconds", "rate"), [([0, 10, 11, 12], 10), ([0, 5], 6)])
def test_the_first_interval_counts_where_it_is_the_only_one(seconds, rate):
    """Thirty steps, of which those of the first interval are slow."""
    series = {"timing/training_seconds": np.array(seconds)}
    run = Run(Path("a.h5"), {"num_steps": 30}, {}, series, np.arange(len(seconds)))
    assert scaling.steps_per_second(run) == rate


def test_collecting_nothing_is_one_sentence(tmp_path, capsys):
    assert scaling.main(["collect", str(tmp_path)]) == 2
    assert "no records of a scaling study" in capsys.readouterr().err
