from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.images.resnet import MODELS, Bottleneck, ResNet, parameter_groups, resnet18, resnet50

NAMES = sorted(MODELS)


def listed_entries(name):
    """(name, dtype, shape) of the entries of torchvision's state_dict, as the file in tests/data lists them."""
    lines = (Path(__file__).parent / "data" / f"{name}_state_dict.txt").read_text().splitlines()
    for key, dtype, *shape in (line.split() for line in lines if not line.startswith("#")):
        yield key, dtype, tuple(map(int, shape))


def entries_of(model):
    return [(key, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in model.state_dict().items()]


def seeded(make, **options):
    torch.manual_seed(5)
    return make(**options)


@pytest.mark.parametrize(("name", "entries", "parameters"), [("resnet18", 122, 11689512), ("resnet50", 320, 25557032)])
def test_names_shapes_order_and_dtypes_are_those_of_torchvision(name, entries, parameters):
    model = MODELS[name]()
    listed = list(listed_entries(name))
    assert entries_of(model) == listed
    assert len(listed) == entries
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert entries_of(MODELS[name](stem="small")) != listed
    assert entries_of(MODELS[name](10))[:-2] == listed[:-2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_gradients_and_buffers_equal_those_of_torchvision(name, mode):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision to compare with")
    ours, theirs = seeded(MODELS[name], num_classes=10), getattr(models, name)(num_classes=10)
    for module in ours.modules():  # weights and statistics that a mistaken order would show in
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for model in (ours.train(mode == "train"), theirs.train(mode == "train")):
        torch.manual_seed(0)
        images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([logits, *gradients, *model.state_dict().values()])
    for ours_value, theirs_value in zip(*results, strict=True):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-5, atol=1e-5)
    again = MODELS[name](num_classes=10)
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_equal_those_of_torchvision_under_the_same_seed(name):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision to compare with")
    for zero in (False, True):
        ours = seeded(MODELS[name], zero_init_residual=zero).state_dict()
        theirs = seeded(getattr(models, name), zero_init_residual=zero).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_convolutions_start_with_variance_two_over_fan_out():
    for name, module in seeded(resnet50).named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.detach().var() * fan_out / 2) == pytest.approx(1.0, abs=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all() and (module.bias == 0).all()), name


def test_bottlenecks_stride_in_the_3x3_convolution():
    strided = [name for name, m in resnet50().named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    stages = [f"layer{number}.0.{name}" for number in (2, 3, 4) for name in ("conv2", "downsample.0")]
    assert strided == ["conv1", *stages]


@pytest.mark.parametrize(("name", "num_blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_zero_init_residual_makes_blocks_start_as_their_shortcut(name, num_blocks):
    zero, plain = seeded(MODELS[name], zero_init_residual=True), seeded(MODELS[name])
    zeroed = {key for key, value in zero.state_dict().items() if not torch.equal(value, plain.state_dict()[key])}
    last = "bn2" if name == "resnet18" else "bn3"
    assert len(zeroed) == num_blocks and all(key.endswith(f"{last}.weight") for key in zeroed)
    channels = 64 if name == "resnet18" else 256
    x = torch.rand(2, channels, 8, 8)  # positive: the last relu keeps it
    assert torch.equal(zero.layer1[1](x), x)
    assert not torch.equal(plain.layer1[1](x), x)


def test_the_small_stem_keeps_the_resolution():
    shapes = {}
    for stem in ("imagenet", "small"):
        model = resnet18(7, stem=stem)
        model.layer1.register_forward_pre_hook(lambda _, args, stem=stem: shapes.update({stem: args[0].shape}))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == {"imagenet": (2, 64, 8, 8), "small": (2, 64, 32, 32)}
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
        resnet18(7, stem="small").load_state_dict(resnet18(7).state_dict())


def test_a_narrow_network_has_the_same_names_and_an_eighth_of_the_channels():
    for name in ("resnet18", "resnet50"):
        wide, narrow = MODELS[name](10).state_dict(), MODELS[name](10, width=8).state_dict()
        assert list(wide) == list(narrow)
        for key, value in wide.items():
            ours = [8 * size for size in narrow[key].shape[:1]]
            assert key.startswith("fc.bias") or key == "fc.weight" or ours == list(value.shape[:1]), key


def test_channels_last_and_compiled_give_the_same_outputs():
    model, images = resnet18(10).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        model.to(memory_format=torch.channels_last)
        layouts = set()
        for stage in (model.layer1, model.layer4):
            stage.register_forward_hook(
                lambda _, __, y: layouts.add(y.is_contiguous(memory_format=torch.channels_last))
            )
        channels_last = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(channels_last, expected, rtol=1e-4, atol=1e-5)
    assert layouts == {True}  # nothing falls back to the other layout


# ---- parameter groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batchnorm_and_biases_are_exempt_from_weight_decay(name):
    model = MODELS[name]()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed, exempt = parameter_groups(model)
    assert "weight_decay" not in decayed and exempt["weight_decay"] == 0.0
    decayed, exempt = ([names[id(parameter)] for parameter in group["params"]] for group in (decayed, exempt))
    assert all(key == "fc.weight" or "conv" in key or key.endswith("downsample.0.weight") for key in decayed)
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias", "bn1.weight", "fc.bias"} <= set(exempt)
    assert sorted(decayed + exempt) == sorted(names.values())  # each once
    assert len(exempt) == 2 * sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) + 1


def test_groups_go_by_type_also_in_wrapped_models_and_with_shared_parameters():
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(ResNet(Bottleneck, (1, 1, 1, 1), 3))
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    for model, num_exempt in ((nn.Sequential(synchronized), 2 * (1 + 4 * 4) + 1), (nn.Sequential(first, second), 2)):
        decayed, exempt = parameter_groups(model)
        assert len(exempt["params"]) == num_exempt
        optimizer = torch.optim.SGD([decayed, exempt], lr=0.1)  # which refuses a parameter in two groups
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
