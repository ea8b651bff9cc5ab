"""Image classification in the suite: the problem of a run, what a validation leaves alone, mistakes of a user."""

import contextlib
import copy
import functools
import math
import os
import re
import shutil
from dataclasses import replace

import gloo
import h5py
import numpy as np
import pytest
import torch
import yaml
from image_runs import AADL, PUBLISHED, image_run, image_set, raw_config
from PIL import Image
from small_runs import identical
from suite_cases import build
from torch import nn

import aadl
from data_loaders.imagenet.decode import Decoding
from data_loaders.imagenet.loaders import TrainLoader
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.sets import open_images
from experiments.__main__ import main
from experiments.distributed.ranks import Ranks
from experiments.images import data as image_data
from experiments.images import problem as imagenet
from experiments.images.data import data_folder, describe, open_sets
from experiments.images.problem import check_settings
from experiments.images.resnet import resnet18
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.records.reading import read_run
from experiments.training.batchnorm import recompute_statistics
from experiments.training.clock import HookSeconds
from experiments.training.closure import AccumulatedClosure
from experiments.training.epochs import Epochs
from experiments.training.problem import Problem
from experiments.training.stage import Stage, make_stages

TOP1 = "metrics/validation/top1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "set")


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


# ---- the step --------------------------------------------------------------------------------------------------------


class Small(Problem):
    """Cross entropy of three classes, without batches of its own."""

    def plan(self):
        return Epochs(lambda *_: [], 1)

    def loss(self, network, batch):
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    def evaluate(self, network):
        return {}


def small_problem(model=None):
    """A classifier of 4 numbers, by default a linear one, and its batch of 12 rows."""
    problem = Small(model or nn.Sequential(nn.Linear(4, 3)), data_source="", data_digest="")
    return problem, (torch.randn(12, 4), torch.randint(0, 3, (12,)))


def closure_of(problem, optimizer, parts=1, scale=False, **options):
    scaler = torch.amp.GradScaler("cpu", enabled=scale, **options)
    return AccumulatedClosure(problem, problem.model, [Stage(optimizer)], parts, scaler)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts, scale):
    problem, batch = small_problem()
    twin = copy.deepcopy(problem.model)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5, momentum=0.9)
    closure = closure_of(problem, optimizer, parts, scale)
    expected = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        closure.batch = batch
        told = closure.step()
        expected.zero_grad()
        loss = nn.functional.cross_entropy(twin(batch[0]), batch[1])
        loss.backward()
        expected.step()
        assert told == pytest.approx(float(loss.detach()), rel=1e-5) and not told.requires_grad
    torch.testing.assert_close(problem.model.state_dict(), twin.state_dict())
    assert closure.num_losses == 3


def test_a_trial_sees_the_loss_at_the_candidate_and_no_gradient():
    problem, batch = small_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    seen = []

    def trials(_, arguments, kwargs):
        with torch.no_grad():
            seen.append(float(arguments[1]()))
            gradients = [p.grad.clone() for p in problem.model.parameters()]
            problem.model[0].bias.add_(1.0)
            seen.append(float(arguments[1]()))
            problem.model[0].weight.zero_()
            seen.append(float(arguments[1]()))
            assert all(torch.equal(p.grad, g) for p, g in zip(problem.model.parameters(), gradients, strict=True))

    closure = closure_of(problem, optimizer, parts=2)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: trials(optimizer, (None, closure), kwargs))
    closure.batch = batch
    before = float(closure.step())
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)  # a bias on all classes changes nothing
    assert seen[0] != before and seen[2] != seen[0] and closure.num_losses == 4


def test_trials_leave_no_trace_in_batchnorm():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    _, batch = small_problem()
    found = []
    for with_trials in (False, True):
        problem = small_problem(copy.deepcopy(model))[0]
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        closure = closure_of(problem, optimizer, parts=2)
        closure.batch, losses = batch, []
        if with_trials:
            optimizer.register_step_post_hook(lambda *_, closure=closure, losses=losses: losses.append(closure()))
        for _ in range(3):
            closure.step()
        assert len(losses) == 3 * with_trials and problem.model.training
        found.append(problem.model.state_dict())
    assert identical(dict(found[0]), dict(found[1]))
    assert int(found[0]["1.num_batches_tracked"]) == 6  # three steps of two parts


def accumulated_on_ranks(rank, world_size, model, batch):
    """Three steps in two parts, each rank with every other row."""
    model = copy.deepcopy(model)  # what comes from the parent is shared with it, and with the other rank
    problem = small_problem(model)[0]
    closure = closure_of(problem, torch.optim.SGD(model.parameters(), lr=0.5), parts=2)
    closure.model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    closure.batch = tuple(tensor[rank::world_size] for tensor in batch)
    for _ in range(3):
        closure.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_ranks_accumulate_the_gradient_of_the_whole_batch(tmp_path):
    problem, batch = small_problem()
    found = gloo.spawn_ranks(tmp_path / "ranks", accumulated_on_ranks, 2, problem.model, batch)
    closure = closure_of(problem, torch.optim.SGD(problem.model.parameters(), lr=0.5), parts=1)
    closure.batch = batch
    for _ in range(3):
        closure.step()
    assert identical(found[0], found[1])
    torch.testing.assert_close(found[0], dict(problem.model.state_dict()))


def test_a_step_that_overflows_is_skipped_and_no_hook_sees_it():
    problem, batch = small_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    aadl.accelerate(optimizer, store_each_nth=1, frequency=2)
    closure = closure_of(problem, optimizer, scale=True, init_scale=1e38, growth_interval=1000)
    closure.batch = (1e3 * batch[0], batch[1])
    weights = copy.deepcopy(problem.model.state_dict())
    closure.step()
    assert closure.num_skipped == 1 and identical(weights, problem.model.state_dict())
    assert aadl.accelerator_of(optimizer).statistics["steps"] == 0
    for _ in range(300):
        closure.step()
        if closure.num_skipped < closure.num_losses:
            break
    assert aadl.accelerator_of(optimizer).statistics["steps"] == 1
    assert not identical(weights, problem.model.state_dict())


def test_seconds_of_hooks_are_those_in_between(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("experiments.training.clock.time.perf_counter", lambda: clock[0])

    def take(seconds):
        def hook(*_):
            clock[0] += seconds

        return hook

    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_post_hook(take(100))
    seconds = HookSeconds(optimizer)
    optimizer.register_step_pre_hook(take(1))
    optimizer.register_step_post_hook(take(2))
    seconds.enclose()
    optimizer.register_step_post_hook(take(1000))
    optimizer.step()
    assert seconds() == 3
    optimizer.step()
    assert seconds() == 6


# ---- the problem of a run --------------------------------------------------------------------------------------------


def test_a_validation_records_both_statistics_and_leaves_no_trace(folder):
    problem = build(image_run(folder), Ranks())
    problem.model.train()
    for batch in problem.batches(1, 0):
        problem.loss(problem.model, batch)  # running statistics move
    before, mode = copy.deepcopy(problem.model.state_dict()), problem.model.training
    random = torch.get_rng_state()
    values = problem.evaluate(problem.model)
    assert identical(before, problem.model.state_dict()) and problem.model.training == mode
    assert torch.equal(random, torch.get_rng_state())
    assert values["metrics/validation/loss"] != values["metrics/validation/stale_loss"]
    assert values["metrics/validation/num_images"] == values["metrics/validation/stale_num_images"] == 20
    for prefix in ("", "stale_"):
        correct = values[f"metrics/validation/{prefix}num_correct_top1"]
        assert values[f"metrics/validation/{prefix}top1"] == correct / 20 and correct == int(correct)
        assert values[f"metrics/validation/{prefix}num_correct_top5"] == 20  # four classes
    # The same by hand, with buffers that are kept.
    images = torch.cat(list(loader_batches(folder)))
    recompute_statistics(problem.model, images.split(8), forward=lambda batch: forward(problem.model, batch))
    again = problem.evaluate(problem.model)
    assert again["metrics/validation/stale_loss"] == pytest.approx(values["metrics/validation/loss"], rel=1e-6)


def loader_batches(folder):
    loader = TrainLoader(open_images(folder, "train"), Decoding(24, 24), batch_size=16, seed=0)
    return loader.statistics_batches(20, 8)


def forward(model, images):
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return model((images / 255 - mean) / deviation)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_share_the_batches_of_a_single_process(folder, world_size):
    config = image_run(folder)
    whole = [batch[1] for batch in build(config, Ranks()).batches(2, 1)]
    parts = [
        [batch[1] for batch in build(config, Ranks(rank=rank, world_size=world_size)).batches(2, 1)]
        for rank in range(world_size)
    ]
    for step, labels in enumerate(whole):
        assert torch.equal(torch.stack([own[step] for own in parts], dim=1).flatten(), labels)


def test_seeds_set_weights_and_order(folder):
    first, again = (build(image_run(folder), Ranks()) for _ in range(2))
    other = build(replace(image_run(folder), seed=1), Ranks())
    assert identical(first.model.state_dict(), again.model.state_dict())
    assert not identical(first.model.state_dict(), other.model.state_dict())
    labels = [torch.cat([labels for _, labels in problem.batches(1, 0)]) for problem in (first, again, other)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_weight_decay_spares_batchnorm_and_biases_if_told(folder):
    optimizer = {"name": "SGD", "lr": 0.1, "weight_decay": 0.01}
    for exempt, expected in ((False, [0.01]), (True, [0.01, 0.0])):
        config = image_run(folder, {"optimizer": optimizer}, training={"exempt_norm_and_bias": exempt})
        problem = build(config, Ranks())
        (stage,) = make_stages(problem, config.variant)
        assert [group["weight_decay"] for group in stage.optimizer.param_groups] == expected
        assert sum(len(group["params"]) for group in stage.optimizer.param_groups) == 62
    assert all(p.ndim == 1 for p in stage.optimizer.param_groups[1]["params"])


def test_rate_and_cadence_follow_the_batch(folder):
    training = {"reference_batch": 4, "batch_size": 8}
    variant = {"acceleration": {"store_each_nth": "1 epoch", "frequency": "2 epochs", "fused": False}}
    config = image_run(folder, variant, training=training)
    problem = build(config, Ranks())
    assert problem.attributes["steps_per_epoch"] == 6
    (stage,) = make_stages(problem, config.variant)
    assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    settings = aadl.accelerator_of(stage.optimizer).settings
    assert (settings.store_each_nth, settings.frequency) == (6, 12)
    published = image_run(folder, {"published": PUBLISHED | {"frequency": "1 epoch"}}, training=training)
    (stage,) = make_stages(problem, published.variant)
    assert stage.memory.settings.frequency == 6 and stage.memory.settings.store_each_nth == 1


def test_bfloat16_and_channels_last_compute_nearly_the_same(folder):
    losses = []
    for changes in ({}, {"precision": "bfloat16"}, {"channels_last": True}):
        problem = build(image_run(folder, training=changes), Ranks())
        losses.append(float(problem.loss(problem.model, next(iter(problem.batches(1, 0)))).detach()))
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[1] != losses[0]


def packed(folder, target):
    for split in ("train", "validation"):
        pack(open_images(folder, split), target, split, Packing(images_per_shard=16))
    return target


def test_packed_images_are_the_same_data(folder, tmp_path):
    packed(folder, tmp_path / "packed")
    plain, shards = (build(image_run(place), Ranks()) for place in (folder, tmp_path / "packed"))
    for left, right in zip(plain.batches(1, 0), shards.batches(1, 0), strict=True):
        assert identical(list(left), list(right))


class Seen(Exception):
    pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loaders_pin_batches_for_a_gpu_and_start_workers_safely(folder, monkeypatch, device):
    def loader(*_, **settings):
        raise Seen(settings["pin_memory"], settings["start_method"])

    monkeypatch.setattr(imagenet, "device_of", lambda ranks: torch.device(device))
    monkeypatch.setattr(imagenet, "make_network", lambda *_: None)
    monkeypatch.setattr(imagenet, "safe_start_method", lambda wish: f"safe {wish}")
    monkeypatch.setattr(imagenet, "TrainLoader", loader)
    with pytest.raises(Seen) as seen:
        build(image_run(folder), Ranks())
    assert seen.value.args == (device == "cuda", "safe auto")


def test_batches_come_as_they_were_read_and_the_problem_brings_them_to_the_device(folder):
    problem = build(image_run(folder), Ranks())
    batch = next(iter(problem.batches(1, 0)))
    assert batch[0].dtype == torch.uint8 and identical(list(batch), list(problem.to_device(batch)))


def test_torch_is_deterministic_during_the_run_if_told(folder, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for told in (True, False):
        problem = build(image_run(folder, training={"deterministic": told}), Ranks())
        assert torch.are_deterministic_algorithms_enabled() == told == problem.attributes["deterministic"]
        problem.close()
        assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    for told, device, benchmark in ((False, "cuda", True), (True, "cuda", False), (False, "cpu", False)):
        undo = imagenet._set_torch(ImageTrainingConfig(batch_size=8, deterministic=told), torch.device(device))
        assert torch.backends.cudnn.benchmark == benchmark
        undo()
        assert not torch.backends.cudnn.benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_refused_where_the_gpu_has_none(folder, monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    problem = ImageConfig()
    training = ImageTrainingConfig(batch_size=8, precision="bfloat16")
    expected = contextlib.nullcontext()
    if not has_bfloat16:
        expected = pytest.raises(ValueError, match="float32 or float16 on Tesla V100, which has no bfloat16")
    with expected:
        check_settings(problem, training, Ranks(), torch.device("cuda"))
    check_settings(problem, training, Ranks(), torch.device("cpu"))
    check_settings(problem, training.model_copy(update={"precision": "float16"}), Ranks(), torch.device("cuda"))


def test_settings_of_the_last_layer_and_of_crops_are_used(folder):
    usual, other = (
        build(image_run(folder, problem=changes), Ranks()) for changes in ({}, {"fc_std": 0.5, "smallest_crop": 1.0})
    )
    assert float(other.model.fc.weight.detach().std()) == pytest.approx(0.5, rel=0.1) and not other.model.fc.bias.any()
    assert float(usual.model.fc.weight.detach().std()) < 0.1 and usual.model.fc.bias.any()
    batches = [next(iter(problem.batches(1, 0))) for problem in (usual, other)]
    assert torch.equal(batches[0][1], batches[1][1]) and not torch.equal(batches[0][0], batches[1][0])


def outcomes_on_ranks(rank, world_size, folder, packed, broken, tmp_path):
    """What two ranks, each with a node of its own, read and are told."""
    opened, original = [], image_data.open_images
    image_data.open_images = lambda *which: opened.append(which) or original(*which)
    ranks = Ranks(rank=rank, world_size=world_size, host=f"node{rank}")
    found = {}
    for _ in range(2):  # each node has its copy
        os.environ["AADL_IMAGENET_DIR"] = str(tmp_path / f"node-{rank}")
        train, validation = open_sets(ImageConfig(data="folder"), ranks)
        found["copy"] = train.folder, train.read(40), validation.read(3), train.name(40), train.digest
    del os.environ["AADL_IMAGENET_DIR"]
    found["opened"] = len(opened)
    train, _ = open_sets(ImageConfig(data="folder", data_path=str(packed)), ranks)
    found["packed"] = train.folder, train.read(40), len(opened)
    for name, path in (("missing", tmp_path / "missing"), ("of one", None)):
        if path is None and rank == 0:
            os.environ["AADL_IMAGENET_DIR"] = str(folder)
        try:
            open_sets(ImageConfig(data="folder", data_path=path and str(path)), ranks)
        except (ValueError, OSError) as error:
            found[name] = str(error)
    os.environ["AADL_IMAGENET_DIR"] = str(tmp_path / f"odd-{rank}")
    try:
        open_sets(ImageConfig(data="folder"), ranks)
    except ValueError as error:
        found["other copy"] = str(error)
    del os.environ["AADL_IMAGENET_DIR"]
    problem = build(image_run(folder), ranks)
    found["validation"] = problem.evaluate(problem.model)
    fractal = ImageConfig(data_path=str(tmp_path / "fractals"), num_classes=2, images_per_class=2, data_size=8,
                          validation_per_class=1, data_seed=5)  # fmt: skip
    made, ensure = [], image_data.fractals.ensure
    image_data.fractals.ensure = lambda *place, **settings: made.append(place) or ensure(*place, **settings)
    found["fractals"] = len(open_sets(fractal, ranks)[0]), len(made)
    problem = build(image_run(broken), ranks)
    for _ in problem.batches(1, 0):
        pass
    found["unreadable"] = problem.finish(problem.model)
    try:
        problem.evaluate(problem.model)
    except RuntimeError as error:
        found["none"] = str(error)
    return found


@pytest.mark.slow
def test_rank_0_opens_the_sets_and_each_node_reads_its_own(folder, tmp_path):
    shards = packed(folder, tmp_path / "packed")
    for name in ("node-0", "node-1", "broken", "odd-0", "odd-1"):
        shutil.copytree(folder, tmp_path / name)
    first, second, *_ = sorted((tmp_path / "odd-1/train").rglob("*.JPEG"))
    shutil.copy(second, first)
    for path in [*(tmp_path / "broken/val").rglob("*.JPEG"), *sorted((tmp_path / "broken/train").rglob("*.JPEG"))[:5]]:
        path.write_bytes(b"")
    places = (folder, shards, tmp_path / "broken", tmp_path)
    found = gloo.spawn_ranks(tmp_path / "ranks", outcomes_on_ranks, 2, *places)
    images, validation = open_images(folder, "train"), open_images(folder, "validation")
    problem = build(image_run(folder), Ranks())
    alone = problem.evaluate(problem.model)
    for rank, each in enumerate(found):
        content = images.read(40), validation.read(3), images.name(40), images.digest
        assert each["copy"] == (tmp_path / f"node-{rank}" / "train", *content)
        assert each["opened"] == (2 if rank == 0 else 0)
        assert each["packed"] == (shards, images.read(40), 4 * (1 - rank))
        assert each["missing"] == f"ImageNet: {tmp_path / 'missing'} does not exist"
        assert re.search(r"some images in \S+odd-\d is \w{8} here and \w{8} on rank 0", each["other copy"])
        for name, value in alone.items():
            assert name.startswith("timing/") or each["validation"][name] == pytest.approx(value, rel=1e-5), name
        assert each["fractals"] == (4, 1 - rank)
        assert each["unreadable"]["num_unreadable_train_images"] == 5
        assert each["none"] == "none of the 20 validation images can be read"
    assert found[0]["of one"].startswith("rank 1 on node1: problem.data_path must name the folder")
    assert "AADL_IMAGENET_DIR must, got neither" in found[1]["of one"]


def test_fractals_are_made_on_first_use(tmp_path):
    config = ImageConfig(data_path=str(tmp_path / "f"), num_classes=2, images_per_class=3, validation_per_class=2,
                         data_size=16, image_size=16, resize=16)  # fmt: skip
    folder = data_folder(config)
    assert folder == tmp_path / "f" and not folder.exists()
    assert describe(config).source == "fractals" and describe(config).num_rows == 6
    assert len(open_images(folder, "train")) == 6 and len(open_images(folder, "validation")) == 4


def test_the_usual_folder_of_fractals_is_named_after_all_that_they_depend_on():
    config = ImageConfig()
    changes = {"num_classes": 11, "images_per_class": 7, "validation_per_class": 7, "data_size": 32, "data_seed": 2**30,
               "data_variation": 0.5}  # fmt: skip
    folders = [
        data_folder(config),
        *(data_folder(config.model_copy(update={name: value})) for name, value in changes.items()),
    ]
    assert len(set(folders)) == 7 and len({folder.parent for folder in folders}) == 1


def test_images_of_the_environment(folder, monkeypatch):
    config = ImageConfig(data="folder")
    monkeypatch.delenv("AADL_IMAGENET_DIR", raising=False)
    with pytest.raises(ValueError, match=r"data_path must name the folder of the images, or AADL_IMAGENET_DIR must"):
        data_folder(config)
    assert data_folder(config, {"AADL_IMAGENET_DIR": str(folder)}) == folder


def test_weights_come_in_from_a_file(folder, tmp_path):
    weights = resnet18(4, width=8).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    problem = build(image_run(folder, problem={"initial_weights": str(tmp_path / "weights.pt")}), Ranks())
    assert identical(dict(problem.model.state_dict()), dict(weights))
    torch.save(resnet18(5, width=8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt are not those of this network: .*fc\.weight"):
        build(image_run(folder, problem={"initial_weights": str(tmp_path / "other.pt")}), Ranks())
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pt holds no weights, saved by torch\.save or in a record: "):
        build(image_run(folder, problem={"initial_weights": str(tmp_path / "text.pt")}), Ranks())
    record = str(tmp_path / "record.h5")
    for complete, error in (
        (False, r"the weights .*record\.h5 .*is incomplete"),
        (True, r"is a record without weights"),
    ):
        with h5py.File(record, "w") as file:
            file.attrs["complete"] = complete
        with pytest.raises((OSError, ValueError), match=error):
            build(image_run(folder, problem={"initial_weights": record}), Ranks())
    with pytest.raises(OSError, match=r"the weights .*none\.pt cannot be read: No such file"):
        build(image_run(folder, problem={"initial_weights": str(tmp_path / "none.pt")}), Ranks())


# ---- the command -----------------------------------------------------------------------------------------------------


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
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and message in told[0]
    assert not list((tmp_path / "results").rglob("*.h5"))


def test_an_image_that_stops_the_run_is_named_in_one_sentence(tmp_path, capsys):
    folder = image_set(tmp_path / "set")
    (folder / "train" / "fractal_0002" / "fractal_0002_00003.JPEG").write_bytes(b"")
    assert run(raw_config(folder, problem={"on_unreadable": "stop"}), tmp_path) == 1
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("error")]
    assert "image 27 (fractal_0002/fractal_0002_00003.JPEG) cannot be read: it is empty" in line
    assert "Traceback" not in told
    assert run(raw_config(folder), tmp_path) == 0
    with h5py.File(tmp_path / "results/imagenet/test/one/seed-0.h5") as file:
        assert file.attrs["num_unreadable_train_images"] == 1 and file.attrs["num_unreadable_validation_images"] == 0


def test_classes_that_do_not_match_are_named(tmp_path, capsys):
    folder = image_set(tmp_path / "set")
    (folder / "val" / "fractal_0003").rename(folder / "val" / "another")
    assert run(raw_config(folder), tmp_path) == 2
    assert "another" in capsys.readouterr().err


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
