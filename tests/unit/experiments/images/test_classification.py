import functools
import math

import gloo
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from experiments.images.classification import Counts, evaluate_exactly, hits_of

NUM_IMAGES, NUM_CLASSES = 97, 11


def images_and_labels():
    """uint8 images; classes in order, as in folders, and the first ones are the easy ones."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 6, 6), dtype=torch.uint8, generator=generator)
    logits = classifier()(images)
    labels = logits.topk(NUM_CLASSES).indices.gather(1, (torch.arange(NUM_IMAGES) // 9).unsqueeze(1))
    return images, labels.squeeze(1)


class Classifier(nn.Module):
    """Buffers that an evaluation must not move, dropout that it must not use."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(108, NUM_CLASSES)

    def forward(self, images):
        return self.linear(self.dropout(self.norm(images.double() / 255)).flatten(1))


def classifier():
    generator = torch.Generator().manual_seed(4)
    model = Classifier().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def expected_counts():
    images, labels = images_and_labels()
    logits = classifier()(images)
    order = logits.argsort(stable=True, dim=1, descending=True)
    found = order == labels.unsqueeze(1)
    return Counts(
        97, 0, int(found[:, :1].sum()), int(found[:, :5].sum()), float(F.cross_entropy(logits, labels, reduction="sum"))
    )


def dealt(rank, world_size, batch_size=8):
    """The images rank, rank + world_size, ... in batches."""
    images, labels = (values[rank::world_size] for values in images_and_labels())
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def evaluate(batches, world_size=1, model=None, num_images=NUM_IMAGES, num_unreadable=lambda: 0):
    model = model or classifier()
    return evaluate_exactly(
        model, batches, model, num_images=num_images, num_unreadable=num_unreadable, world_size=world_size
    )


def evaluate_dealt(rank, world_size):
    return evaluate(dealt(rank, world_size), world_size)


def test_counts_are_those_of_a_stable_sort():
    counts, expected = evaluate_dealt(0, 1), expected_counts()
    assert_same(counts, expected)
    assert (counts.num_top1, counts.num_top5) == (9, 45)  # the first of eleven ranks, the first five
    assert counts.series("stale_") == {
        "metrics/validation/stale_loss": counts.loss_sum / 97,
        "metrics/validation/stale_top1": 9 / 97,
        "metrics/validation/stale_top5": 45 / 97,
        "metrics/validation/stale_num_correct_top1": 9,
        "metrics/validation/stale_num_correct_top5": 45,
        "metrics/validation/stale_num_images": 97,
    }


# ---- ranks -----------------------------------------------------------------------------------------------------------


def rank_0_has_all(rank, world_size):
    return evaluate(dealt(0, 1) if rank == 0 else [], world_size)


def padded(rank, world_size):
    data = TensorDataset(*images_and_labels())
    sampler = DistributedSampler(data, world_size, rank, shuffle=False)  # repeats the first images
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    with pytest.raises(RuntimeError) as raised:
        evaluate(loader, world_size)
    return str(raised.value), evaluate(loader, world_size, num_images=len(sampler) * world_size)


def with_unreadable(rank, world_size, num_images=NUM_IMAGES):
    """The first image of each batch cannot be read."""
    skipped = []

    def readable():
        for images, labels in dealt(rank, world_size):
            skipped.append(images[0])
            yield images[1:], labels[1:]

    return evaluate(readable(), world_size, num_images=num_images, num_unreadable=lambda: len(skipped))


def one_fails(rank, world_size):
    def failing():
        yield dealt(rank, world_size)[0]
        raise OSError("unreadable")

    try:
        evaluate(failing() if rank == 1 else dealt(rank, world_size), world_size)
    except Exception as error:
        return type(error), str(error)


CASES = (evaluate_dealt, rank_0_has_all, padded, with_unreadable, one_fails)


def all_cases(rank, world_size):
    return {function.__name__: function(rank, world_size) for function in CASES}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """on_ranks(case, world_size): results of a case by rank. Processes take long to start, so they do all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    run = functools.cache(lambda world_size: gloo.spawn_ranks(folder / str(world_size), all_cases, world_size))
    return lambda case, world_size: [results[case.__name__] for results in run(world_size)]


def assert_same(counts, expected):
    """Equal integers; losses are summed up in another order."""
    assert counts[:-1] == expected[:-1]
    assert counts.loss_sum == pytest.approx(expected.loss_sum, rel=1e-12)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [evaluate_dealt, rank_0_has_all])
def test_counts_do_not_depend_on_the_number_of_ranks(on_ranks, world_size, case):
    for counts in on_ranks(case, world_size):
        assert_same(counts, evaluate_dealt(0, 1))


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_padded_sampler_is_noticed_and_gives_another_answer(on_ranks, world_size):
    exact, duplicates = evaluate_dealt(0, 1), -NUM_IMAGES % world_size
    for message, counts in on_ranks(padded, world_size):
        seen = 97 + duplicates
        assert message.startswith(f"the evaluation saw {seen} images and 0 unreadable ones, but the set has 97")
        assert counts.num_top1 == exact.num_top1 + duplicates  # the first images are the easy ones
        assert counts.num_top1 / counts.num_images > exact.num_top1 / exact.num_images


def test_unreadable_images_are_counted_on_their_own(on_ranks):
    first, second = on_ranks(with_unreadable, 2)
    assert first == second
    assert (first.num_images, first.num_unreadable) == (84, 13)
    with pytest.raises(RuntimeError, match="saw 84 images and 13 unreadable ones, but the set has 98"):
        with_unreadable(0, 1, 98)


def test_no_rank_waits_for_one_that_failed(on_ranks):
    other, failed, *_ = on_ranks(one_fails, 2)
    assert other == (RuntimeError, "the evaluation is not complete: 1 of 2 ranks failed")
    assert failed == (OSError, "unreadable")


# ---- one rank --------------------------------------------------------------------------------------------------------


def test_the_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    model = classifier().train()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    counts = evaluate(dealt(0, 1), model=model)
    assert counts == evaluate_dealt(0, 1)
    assert model.training and model.norm.training and model.dropout.training
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    trained = model(images_and_labels()[0])
    assert int(hits_of(trained, images_and_labels()[1])[0]) != counts.num_top1


def test_images_of_which_none_can_be_read_are_an_error():
    with pytest.raises(RuntimeError, match="none of the 97 validation images can be read"):
        evaluate([], num_unreadable=lambda: 97)


@pytest.mark.parametrize(
    ("logits", "labels", "hits"),
    [
        ([[1, 2, 3]] * 3, [0, 1, 2], (1, 3)),  # three classes: all are among the first five
        ([[0] * 7] * 7, range(7), (1, 5)),  # ties: in the order of the classes
        ([[2, 5, 5, 1, 0, 0, 0]] * 7, range(7), (1, 5)),
        ([[0, math.nan, 1]] * 3, range(3), (0, 0)),  # a diverged network has no hits
        ([[-math.inf, math.inf, 0, 1, 2, 3]] * 6, range(6), (1, 5)),
        ([], [], (0, 0)),
    ],
)
def test_ties_few_classes_and_values_that_are_not_finite(logits, labels, hits):
    logits = torch.tensor(logits, dtype=torch.float32).reshape(len(labels), -1 if len(labels) else 4)
    found = hits_of(logits, torch.tensor(list(labels), dtype=torch.int64))
    assert found.dtype == torch.int64 and tuple(found.tolist()) == hits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_waits_once():
    model, expected = classifier().cuda(), evaluate_dealt(0, 1)
    batches = [(images.pin_memory(), labels.pin_memory()) for images, labels in dealt(0, 1)]
    evaluate(batches, model=model)  # libraries are loaded

    def watched():
        torch.cuda.set_sync_debug_mode("error")  # any wait within the pass is an error
        yield from batches
        torch.cuda.set_sync_debug_mode("default")

    try:
        counts = evaluate(watched(), model=model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(counts, expected)
