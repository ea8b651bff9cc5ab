"""Image classification in the suite: the problem of a run, what a validation leaves alone, mistakes of a user."""

import contextlib
import copy
import os
import re
import shutil
from dataclasses import replace

import gloo
import h5py
import pytest
import torch
from image_runs import PUBLISHED, image_run, image_set
from small_runs import identical
from suite_cases import build

import aadl
from data_loaders.imagenet.decode import Decoding
from data_loaders.imagenet.loaders import TrainLoader
from data_loaders.imagenet.packing import Packing, pack
from data_loaders.imagenet.sets import open_images
from experiments.distributed.ranks import Ranks
from experiments.images import data as image_data
from experiments.images import problem as imagenet
from experiments.images.data import data_folder, describe, description_of, open_sets
from experiments.images.problem import check_settings
from experiments.images.resnet import resnet18
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.training.batchnorm import recompute_statistics
from experiments.training.stage import make_stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "set")


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


def test_weight_decay_spares_batchnorm_and_biases_on_request(folder):
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
    monkeypatch.setattr(imagenet, "safe_start_method", lambda: "a safe one")
    monkeypatch.setattr(imagenet, "TrainLoader", loader)
    with pytest.raises(Seen) as seen:
        build(image_run(folder), Ranks())
    assert seen.value.args == (device == "cuda", "a safe one")


def test_batches_come_as_they_were_read_and_the_problem_brings_them_to_the_device(folder):
    problem = build(image_run(folder), Ranks())
    batch = next(iter(problem.batches(1, 0)))
    assert batch[0].dtype == torch.uint8 and identical(list(batch), list(problem.to_device(batch)))


def test_torch_is_deterministic_during_the_run_on_request(folder, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for deterministic in (True, False):
        problem = build(image_run(folder, training={"deterministic": deterministic}), Ranks())
        assert torch.are_deterministic_algorithms_enabled() == deterministic == problem.attributes["deterministic"]
        problem.close()
        assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    for deterministic, device, benchmark in ((False, "cuda", True), (True, "cuda", False), (False, "cpu", False)):
        undo = imagenet.set_torch(ImageTrainingConfig(batch_size=8, deterministic=deterministic), torch.device(device))
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
    """What two ranks, each with a node of its own, read and receive."""
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


def test_other_validation_images_are_other_data():
    class Listed(list):
        source = "folder"

        def __init__(self, digest):
            super().__init__(range(3))
            self.digest = digest

    sets = [(Listed(train), Listed(validation)) for train, validation in ("ab", "ab", "ac", "cb")]
    found = [description_of(ImageConfig(data="folder"), each) for each in sets]
    assert len({each.digest for each in found}) == 3 and found[0] == found[1] and found[0].num_rows == 3


def test_an_image_alone_is_left_out_of_the_statistics(folder):
    """At the end of the network it has a single value in a channel, of which there is no variance."""
    problem = build(image_run(folder, problem={"statistics_images": 17}), Ranks())
    assert problem.evaluate(problem.model)["metrics/validation/num_images"] == 20
    problem.close()


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
