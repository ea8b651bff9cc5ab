import pytest
import torch

from experiments.launch import Ranks, device_of, ranks_from_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_a_single_process():
    assert ranks_from_environment({"HOME": "/"}) == Ranks()
    assert Ranks().world_size == 1


def test_torchrun():
    assert ranks_from_environment(TORCHRUN) == Ranks(3, 4, 1, "host", 29500, "torchrun")


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_a_missing_variable_is_named(name):
    env = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=rf"environment variable {name} is missing .*torchrun sets all of"):
        ranks_from_environment(env)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK must be an integer >= 0, got 'x'"),
        ("RANK", "-1", "RANK must be an integer >= 0, got '-1'"),
        ("RANK", "4", "RANK=4 must be below WORLD_SIZE=4"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be an integer >= 1"),
        ("LOCAL_RANK", "7", "LOCAL_RANK=7 must not exceed RANK=3"),
        ("MASTER_PORT", "70000", r"MASTER_PORT must be an integer in \[1, 65535\]"),
        ("MASTER_ADDR", "", "MASTER_ADDR must name the host"),
    ],
)
def test_a_wrong_variable_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        ranks_from_environment(TORCHRUN | {name: value})


def test_device():
    assert device_of(Ranks()).type == ("cuda" if torch.cuda.is_available() else "cpu")
