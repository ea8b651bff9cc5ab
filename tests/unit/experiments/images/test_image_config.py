"""Settings of image classification: cadences in epochs, schedules, and mistakes that are named."""

import itertools
import math

import pytest
import torch
from image_runs import RAW, SGD, image_run, raw_config

from experiments.catalog import parse_config
from experiments.distributed.ranks import Ranks
from experiments.images.epochs import scaled_rate, share, step_scheduler
from experiments.images.experiment import EXPERIMENT
from experiments.images.settings import ImageTrainingConfig
from experiments.runs.config import expand_runs
from experiments.runs.session import identity_of_checkpoints
from experiments.settings.kinds import in_steps


def test_a_setting_that_was_added_later_leaves_the_identity_of_older_records_as_it_was():
    def run(**problem):
        return image_run("images", problem=problem)

    plain, turned = run(), run(exif_orientation=True)
    assert "exif_orientation" not in plain.as_json() and '"exif_orientation": true' in turned.as_json()
    assert plain.identity() == run(exif_orientation=False).identity() != turned.identity()


def test_runs_are_judged_by_the_share_of_right_classes():
    assert EXPERIMENT.merit(["metrics/validation/loss"]) == ("metrics/validation/top1", True)


def test_cadences_may_be_given_in_epochs():
    steps = in_steps({"store_each_nth": "1 epoch", "frequency": "2.5 epochs", "wait_iterations": 7, "reg_acc": 0.1}, 10)
    assert steps == {"store_each_nth": 10, "frequency": 25, "wait_iterations": 7, "reg_acc": 0.1}
    steps = in_steps({"store_each_nth": "0.01 epochs", "wait_iterations": "0 epochs"}, 10)
    assert steps == {"store_each_nth": 1, "wait_iterations": 0}


@pytest.mark.parametrize("text", ["epoch", "-1 epochs", "1 epochx", "0 epochs", "nan epochs", ""])
def test_other_texts_are_no_cadence(text):
    with pytest.raises(ValueError, match=r"^frequency must be an integer or a number of epochs, .*got"):
        in_steps({"frequency": text}, 10)


def test_cadences_in_epochs_are_for_images_alone_and_stay_texts_in_the_record():
    published = {"store_each_nth": "1 epoch", "frequency": "2 epochs", "history_depth": 3}
    raw = raw_config("folder", {"published": published})
    variant = parse_config(raw).variants["one"]
    assert (variant.published.store_each_nth, variant.published.frequency) == ("1 epoch", "2 epochs")
    other = {"experiment": "graduate_admissions", "scale": "test", "seeds": 0,
             "variants": {"one": {"optimizer": SGD, "published": published}}}  # fmt: skip
    with pytest.raises(ValueError, match=r"^variants\.one\.published: store_each_nth must be an integer, got '1 e"):
        parse_config(other)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("training", {"batch_size": None}, "and batch_size_per_rank must be given, got None and None"),
        ("training", {"batch_size_per_rank": 4}, "and batch_size_per_rank must be given, got 16 and 4"),
        ("training", {"schedule": "step"}, "milestones must be a list of epochs with schedule step"),
        ("training", {"schedule": "step", "milestones": [2, 1]}, r"milestones must ascend, got \[2\.0, 1\.0\]"),
        ("training", {"schedule": "step", "milestones": [1, 2]}, r"must be below epochs = 2, got \[1\.0, 2\.0\]"),
        ("training", {"warmup_epochs": 2}, "warmup_epochs must be below epochs = 2, got 2"),
        ("training", {"scheduler": {"name": "StepLR"}}, r"unknown key training\.scheduler"),
        ("problem", {"start_method": "fork"}, r"^unknown key problem\.start_method, which was removed: leave it out$"),
        ("problem", {"resize": 20}, "resize must be at least image_size = 24, got 20"),
        ("problem", {"smallest_crop": 1.01}, r"smallest_crop must be less than or equal to 1, got 1\.01"),
        ("problem", {"data_variation": 2.5}, r"data_variation must be less than or equal to 2, got 2\.5"),
    ],
)
def test_settings_that_do_not_go_together_are_named(part, changes, message):
    parse_config(RAW)
    with pytest.raises(ValueError, match=message):
        parse_config(raw_config("folder", **{part: changes}))


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"optimizer": {"name": "LBFGS"}}, r"optimizer: name must be one of .*got 'LBFGS'"),
        ({"acceleration": {"frequency": "2 epoch s"}}, r"variants\.one\.acceleration: frequency must be"),
        ({"then": {"after": 1, "optimizer": SGD}}, r"unknown key variants\.one\.then"),
        ({"ema_decay": 0.9, "mean_epochs": 2}, r"variants\.one: ema_decay and mean_epochs exclude each other"),
    ],
)
def test_variants_that_are_not_for_images_are_named(variant, message):
    with pytest.raises(ValueError, match=message):
        parse_config(raw_config("folder", variant))


def test_the_batch_size_study_takes_whole_batches_and_measures_updates():
    raw = raw_config("folder") | {"studies": {"batch_size": {"variant": "one", "sizes": [8, 48], "steps": 12}}}
    runs = [run for run in expand_runs(parse_config(raw), num_rows=50) if run.study == "batch_size"]
    assert [(run.name, run.seed) for run in runs[:2]] == [("one--batch-8", 0), ("one--batch-48", 0)]
    assert [(run.training.epochs, run.training.evaluate_every) for run in runs[:2]] == [(2, 2), (12, 12)]
    assert all(run.training.measure_updates for run in runs)
    with pytest.raises(ValueError, match="a batch of 48 images is larger than the training set of 40"):
        expand_runs(parse_config(raw), num_rows=40)


def test_a_study_that_ends_within_the_warm_up_is_named():
    raw = raw_config("folder", training={"epochs": 4, "warmup_epochs": 2})
    raw |= {"studies": {"batch_size": {"variant": "one", "sizes": [8], "steps": 12}}}
    with pytest.raises(ValueError, match=r"steps must be more than training\.warmup_epochs = 2 take, got 12, .* 2 epo"):
        expand_runs(parse_config(raw), num_rows=50)


def test_the_ends_of_ranges_are_allowed():
    ends = {"smallest_crop": 1, "data_variation": 2, "statistics_images": 2}
    problem = parse_config(raw_config("folder", problem=ends)).problem
    assert (problem.smallest_crop, problem.data_variation, problem.statistics_images) == (1.0, 2.0, 2)


def test_a_rate_that_is_scaled_must_be_given():
    with pytest.raises(ValueError, match=r"optimizer\.lr must be given, because training\.reference_batch scales it"):
        parse_config(raw_config("folder", {"optimizer": {"name": "SGD"}}, training={"reference_batch": 8}))


def test_a_fused_optimizer_hides_the_steps_that_a_scaler_skips():
    fused = {"optimizer": SGD | {"fused": True}}
    parse_config(raw_config("folder", fused, training={"precision": "bfloat16"}))
    with pytest.raises(ValueError, match=r"optimizer\.fused must be false with precision float16, got true"):
        parse_config(raw_config("folder", fused, training={"precision": "float16"}))


def schedule(**settings):
    return ImageTrainingConfig(**({"epochs": 10, "batch_size": 8} | settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 5: 1.0, 10: 1.0}),
        ({"schedule": "constant", "warmup_epochs": 4}, {0: 0.1, 2: 0.55, 4: 1.0, 10: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 5: 0.5, 10: 0.0, 11: 0.0}),
        ({"schedule": "cosine", "warmup_epochs": 2, "final_share": 0.2}, {2: 1.0, 6: 0.6, 10: 0.2}),
        ({"schedule": "polynomial"}, {0: 1.0, 5: 0.25, 10: 0.0}),
        ({"schedule": "step", "milestones": (3.0, 6.0)}, {0: 1.0, 2.99: 1.0, 3: 0.1, 6: 0.01, 10: 0.01}),
    ],
)
def test_shares_of_the_learning_rate(settings, expected):
    for epoch, value in expected.items():
        assert share(schedule(**settings), epoch, 0.1) == pytest.approx(value, abs=1e-12)


def test_the_rate_rises_from_that_of_the_reference_batch():
    """Goyal et al.: 0.1 per 256 images; batches of 8192 rise from 0.1 to 3.2."""
    training = schedule(batch_size=8192, reference_batch=256, warmup_epochs=5, schedule="step", milestones=(6.0,))
    assert scaled_rate(training, 8192) == 32 and scaled_rate(schedule(), 8192) == 1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1 * 32)
    scheduler = step_scheduler(optimizer, training, 4, 8192)
    rates = []
    for _ in range(4 * 6 + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.65) and rates[20] == pytest.approx(3.2)
    assert rates[24] == pytest.approx(0.32)
    assert all(math.isclose(b - a, 3.1 / 20) for a, b in itertools.pairwise(rates[:21]))


def test_a_batch_per_rank_grows_with_the_ranks():
    training = schedule(batch_size=None, batch_size_per_rank=4)
    assert training.global_batch(Ranks(world_size=3)) == 12 and schedule().global_batch(Ranks(world_size=3)) == 8


def test_a_run_goes_on_with_the_same_batch_over_all_ranks_alone():
    of_rank, of_all = (
        image_run("folder", training=batch) for batch in ({"batch_size": None, "batch_size_per_rank": 4}, {})
    )
    identities = [
        identity_of_checkpoints(run, "", Ranks(world_size=size)) for run in (of_rank, of_all) for size in (1, 2)
    ]
    assert len(set(identities)) == 3 and identities[2] == identities[3]
