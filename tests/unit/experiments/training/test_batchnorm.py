import copy
import functools

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from experiments.training.batchnorm import broadcast_buffers, in_eval_mode, recompute_statistics, untouched_buffers

SIZES = (6, 3, 8, 2, 5, 4, 7)  # of batches: unequal


class Network(nn.Module):
    """Two BatchNorm layers, dropout between them; the second one is called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.dropout(F.relu(self.bn1(self.conv1(x))))
        for _ in range(2):
            x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def network(dtype=torch.float32):
    """The same on every rank, with statistics of some training."""
    torch.manual_seed(1)
    model = Network().to(dtype)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8, dtype=dtype))
    return model


def batches_of(sizes=SIZES, dtype=torch.float32, pixels=8):
    """Batches that differ from each other, with a mean far from zero."""
    generator = torch.Generator().manual_seed(2)
    images = (torch.randn(size, 3, pixels, pixels, generator=generator, dtype=torch.float64) for size in sizes)
    return [(image * (1 + number) + 10 * number).to(dtype) for number, image in enumerate(images)]


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def statistics(model):
    """Running mean and variance by layer."""
    return {name: torch.stack([layer.running_mean, layer.running_var]) for name, layer in norms(model).items()}


def reference(model, batches):
    """By the definition: all inputs of a layer in one float64 array."""
    model = copy.deepcopy(model).double().eval()
    inputs = {name: [] for name in norms(model)}
    for name, layer in norms(model).items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].transpose(0, 1)))
    with torch.no_grad():
        for images in batches:
            model(images.double())
    values = {name: torch.cat([x.flatten(1) for x in seen], 1) for name, seen in inputs.items()}
    return {name: torch.stack([x.mean(1), x.var(1)]) for name, x in values.items()}


def assert_equal(actual, expected, rtol):
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(actual[name].double(), values.double(), rtol=rtol, atol=1e-12, msg=f"{name}: {{}}")


def state_of(model):
    """Everything a call must leave alone: buffers and parameters by identity and bits, modes, attributes, hooks."""
    tensors = {key: (id(t), t.detach().clone()) for key, t in [*model.named_buffers(), *model.named_parameters()]}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "forward", "momentum", "training", "eps")
    attributes = {
        (name, key): copy.copy(vars(module)[key])
        for name, module in model.named_modules()
        for key in hooks
        if key in vars(module)
    }
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return tensors, attributes, flags, torch.get_rng_state()


def same_state(before, after, changed=()):
    return (
        all(
            before[0][key][0] == after[0][key][0]
            and (torch.equal(before[0][key][1], after[0][key][1]) != (key in changed))
            for key in before[0]
        )
        and before[1:3] == after[1:3]
        and torch.equal(before[3], after[3])
    )


RUNNING = tuple(f"{layer}.{name}" for layer in ("bn1", "bn2") for name in ("running_mean", "running_var"))


# ---- values ----------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_values_in_float64():
    model, batches = network(torch.float64), batches_of(dtype=torch.float64)
    expected = reference(model, batches)
    assert recompute_statistics(model, batches) == sum(SIZES)
    assert_equal(statistics(model), expected, 1e-11)

    single = network()
    recompute_statistics(single, batches_of())
    assert_equal(statistics(single), expected, 1e-5)

    torchs = network(torch.float64).eval()
    update_bn(batches, torchs)  # whose variance lacks the part between the batches
    assert not torch.allclose(statistics(torchs)["bn1"][1], expected["bn1"][1], rtol=0.1)


@pytest.mark.parametrize(("dtype", "mean", "rtol"), [(torch.float32, 1e4, 1e-4), (torch.float64, 1e6, 1e-8)])
def test_a_mean_far_from_zero_costs_no_digits(dtype, mean, rtol):
    values = mean + torch.randn(40, 3, 5, 5, dtype=dtype)
    layer = nn.BatchNorm2d(3, dtype=dtype)
    recompute_statistics(layer, values.split(7))
    exact = (values.double() - mean).transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=rtol, atol=0)
    raw = values.transpose(0, 1).flatten(1)
    naive = (raw.square().mean(1) - raw.mean(1).square()) * (1000 / 999)
    assert not torch.allclose(naive.double(), exact, rtol=10 * rtol)


@pytest.mark.parametrize(
    ("make", "shape"), [(nn.BatchNorm1d, (9, 3)), (nn.BatchNorm1d, (9, 3, 4)), (nn.BatchNorm3d, (9, 3, 2, 2, 2))]
)
def test_other_dimensions_and_layers_without_weights(make, shape):
    values, layer = torch.randn(shape) + 2, make(3, affine=False)
    recompute_statistics(layer, values.split(3))
    exact = values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, exact.mean(1))
    torch.testing.assert_close(layer.running_var, exact.var(1))


def test_a_layer_that_no_image_reaches_keeps_its_statistics():
    model = nn.ModuleDict({"used": nn.BatchNorm2d(3), "unused": nn.BatchNorm2d(3)})
    model["unused"].running_var.fill_(7.0)
    recompute_statistics(model, batches_of(), forward=model["used"])
    assert bool((model["unused"].running_var == 7).all()) and not bool((model["used"].running_var == 1).any())


def test_forward_decides_what_the_model_sees():
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    direct, prepared = network(), network()
    recompute_statistics(direct, (images / 255).split(5))

    def forward(batch):
        return prepared(batch / 255)

    assert recompute_statistics(prepared, [*images.split(5), images[:0]], forward=forward) == 12  # and one empty batch
    assert_equal(statistics(prepared), statistics(direct), 1e-6)


def test_autocast_keeps_float32_statistics():
    model, batches = network(), batches_of()

    def forward(images):
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    expected = reference(model, batches)
    recompute_statistics(model, batches, forward=forward)
    assert_equal({"bn1": statistics(model)["bn1"]}, {"bn1": expected["bn1"]}, 0.1)
    assert statistics(model)["bn1"].dtype == torch.float32


def test_a_compiled_model_is_seen_through_and_not_compiled_again():
    model, batches, graphs = network().eval(), batches_of(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(batches[0])
        num_graphs = len(graphs)
        expected = network()
        recompute_statistics(expected, batches)
        recompute_statistics(model, batches, forward=compiled)
        assert len(graphs) == num_graphs > 0
        assert_equal(statistics(model), statistics(expected), 1e-6)
        torch.testing.assert_close(compiled(batches[0]), expected.eval()(batches[0]))


# ---- nothing else ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_only_running_means_and_variances_change(training):
    model = network().train(training)
    model.bn1.eval()  # frozen by the user
    model.fc.weight.requires_grad_(False)
    model.bn2.register_forward_hook(lambda *_: None)
    outputs = []
    before = state_of(model)
    recompute_statistics(model, batches_of(), forward=lambda x: outputs.append(model(x)))
    assert same_state(before, state_of(model), RUNNING)
    assert not any(output.requires_grad for output in outputs)  # no graph
    assert not same_state(before, state_of(model))  # the comparison sees the change


def test_the_random_numbers_of_a_loader_do_not_move_those_of_training():
    model, images = network(), torch.randn(12, 3, 8, 8)
    before = torch.get_rng_state()
    recompute_statistics(model, (images[torch.randperm(12)[:4]] for _ in range(3)))
    assert torch.equal(before, torch.get_rng_state())


def failing_batches():
    yield from batches_of()[:2]
    raise OSError("unreadable")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (failing_batches, OSError, "unreadable"),
        (lambda: [*batches_of()[:2], torch.zeros(2, 5, 8, 8)], RuntimeError, "channels"),  # fails within the model
        (list, RuntimeError, "there is no image on any rank"),
        (lambda: [torch.zeros(1, 3, 3, 3)], ValueError, "more than 1 value per channel"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(batches, error, message):
    model = network()
    before = state_of(model)
    with pytest.raises(error, match=message):
        recompute_statistics(model, batches())
    assert same_state(before, state_of(model))


def test_a_forward_that_goes_around_the_model_is_an_error():
    model, other = network(), network()
    with pytest.raises(RuntimeError, match="forward reaches no BatchNorm layer of the model"):
        recompute_statistics(model, batches_of(), forward=other)
    assert recompute_statistics(nn.Linear(2, 2), [torch.randn(4, 2)]) == 0
    assert recompute_statistics(nn.BatchNorm2d(3, track_running_stats=False), batches_of()) == 0


# ---- ranks -----------------------------------------------------------------------------------------------------------


def recomputed(rank, world_size, num_batches, synchronized):
    model = network()
    if synchronized:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        with pytest.raises(ValueError, match="expected input tensor to be on"):  # it would communicate, on a GPU
            copy.deepcopy(model).train()(batches_of()[0])
    for buffer in model.buffers():  # each rank has statistics of its own
        buffer += rank
    reduce, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **options: (calls.append(1), reduce(*args, **options))
    count = recompute_statistics(model, batches_of()[:num_batches][rank::world_size], world_size=world_size)
    dist.all_reduce = reduce
    return count, len(calls), statistics(model), int(model.bn1.num_batches_tracked)


def one_fails(rank, world_size):
    model = network()
    before = state_of(model)
    try:
        recompute_statistics(model, failing_batches() if rank == 1 else batches_of(), world_size=world_size)
    except Exception as error:
        return type(error), str(error), same_state(before, state_of(model))


def wrapped(rank, world_size):
    model = DistributedDataParallel(network())
    with pytest.raises(ValueError, match=r"pass model\.module"):
        recompute_statistics(model, batches_of(), world_size=world_size)
    return recompute_statistics(model.module, batches_of()[: 1 + rank], world_size=world_size)


def broadcast(rank, world_size, really):
    model = nn.Sequential(network(), Replacing())
    for buffer in model.buffers():
        buffer += 2**40 * rank if buffer.dtype == torch.int64 else 0.1 * rank
    identities = [id(buffer) for buffer in model.buffers()]
    if really:
        broadcast_buffers(model, world_size)
    assert identities == [id(buffer) for buffer in model.buffers()]
    return dict(model.named_buffers())


CASES = {
    "plain": (recomputed, 7, False),
    "synchronized": (recomputed, 7, True),
    "a rank with nothing": (recomputed, 1, True),
    "one fails": (one_fails,),
    "wrapped": (wrapped,),
    "broadcast": (broadcast, True),
    "not broadcast": (broadcast, False),
}


def all_cases(rank, world_size):
    return {name: function(rank, world_size, *args) for name, (function, *args) in CASES.items()}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """on_ranks(name, world_size): results of a case by rank. Processes take long to start, so they do all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    run = functools.cache(lambda world_size: gloo.spawn_ranks(folder / str(world_size), all_cases, world_size))
    return lambda name, world_size: [results[name] for results in run(world_size)]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["plain", "synchronized", "a rank with nothing"])
def test_statistics_do_not_depend_on_the_number_of_ranks(on_ranks, world_size, case):
    batches = batches_of()[: CASES[case][1]]
    model = network()
    count = recompute_statistics(model, batches)
    results = on_ranks(case, world_size)
    for rank, (rank_count, num_calls, rank_statistics, tracked) in enumerate(results):
        assert (rank_count, num_calls, tracked) == (count, 1, 3 + rank)
        assert_equal(rank_statistics, statistics(model), 1e-6)
        assert_equal(rank_statistics, reference(model, batches), 1e-5)
        assert all(torch.equal(values, results[0][2][name]) for name, values in rank_statistics.items())
    alone = network()
    recompute_statistics(alone, batches[::world_size])
    assert len(batches) == 1 or not torch.allclose(statistics(alone)["bn1"], statistics(model)["bn1"], rtol=1e-2)


def test_a_replaced_forward_method_is_put_back():
    calls = []
    layer = nn.SyncBatchNorm(3)
    layer.forward = lambda inputs: calls.append(inputs)  # a method of the user's: not called, and there again after it
    method = layer.forward
    recompute_statistics(layer, batches_of())
    assert not calls and layer.forward is method


def test_no_rank_waits_for_one_that_failed(on_ranks):
    other, failed, *_ = on_ranks("one fails", 2)
    assert other == (RuntimeError, "BatchNorm statistics were not recomputed: 1 of 2 ranks failed", True)
    assert failed == (OSError, "unreadable", True)


def test_distributed_data_parallel_is_refused(on_ranks):
    assert on_ranks("wrapped", 2) == [SIZES[0] + SIZES[0] + SIZES[1]] * 2


# ---- modes and buffers -----------------------------------------------------------------------------------------------


class Replacing(nn.Module):
    """Replaces its buffers instead of writing to them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.seen = self.seen + 1
        self.nothing = x
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_trials_in_train_mode_leave_every_buffer_bit_identical(fails):
    model = nn.Sequential(network(), Replacing()).train()
    model[0].bn1.running_mean.fill_(float("nan"))
    buffers = {key: (id(b), b.clone()) for key, b in model.named_buffers()}
    try:
        with untouched_buffers(model):
            model(batches_of()[0])
            assert all(not torch.equal(b, buffers[key][1]) for key, b in model.named_buffers() if key in buffers)
            if fails:
                raise KeyError("trial")
    except KeyError:
        assert fails
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys()
    for key, (identity, value) in buffers.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)
        assert id(after[key]) == identity


def test_modes_are_restored_one_by_one():
    model = network()
    model.bn1.eval()
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in (model, model.bn1, model.bn2, model.dropout)] == [True, False, True, True]


def test_the_buffers_of_rank_0_are_broadcast(on_ranks):
    first, second = on_ranks("broadcast", 2)
    untouched, different = on_ranks("not broadcast", 2)
    for key in first:
        assert torch.equal(first[key], untouched[key]) and torch.equal(second[key], untouched[key])
        assert not torch.equal(different[key], untouched[key])
    broadcast_buffers(network(), 1)  # needs no process group


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_waits_once():
    model, batches = network(), batches_of()
    expected = reference(model, batches)
    model.cuda()
    images = [batch.pin_memory() for batch in batches]
    recompute_statistics(model, [batch.cuda() for batch in images])  # libraries are loaded
    assert_equal({name: values.cpu() for name, values in statistics(model).items()}, expected, 1e-4)

    def forward(batch):
        torch.cuda.set_sync_debug_mode("error")  # any wait within the pass is an error
        return model(batch.cuda(non_blocking=True))

    class Batches(list):
        def __iter__(self):
            yield from super().__iter__()
            torch.cuda.set_sync_debug_mode("default")

    try:
        assert recompute_statistics(model, Batches(images), forward=forward) == sum(SIZES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal({name: values.cpu() for name, values in statistics(model).items()}, expected, 1e-4)
