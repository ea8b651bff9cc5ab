"""One loader for every YAML file and every --set: numbers as a person reads them, nothing repeated, nothing empty."""

import math

import pytest

from experiments.settings.yaml_file import parse_setting, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("008", 8),
        ("010", 10),
        ("0o10", 8),
        ("0xff", 255),
        ("-07", -7),
        ("1e-3", 1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("=", "="),
        ("2026-01-31", "2026-01-31"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("''", ""),
        ("{a: '', b: \"\"}", {"a": "", "b": ""}),
        ("{a: 1, b: [01, 2.50]}", {"a": 1, "b": [1, 2.5]}),
        ("08-11", "08-11"),
    ],
)
def test_a_scalar_is_what_a_person_reads(text, value):
    found = parse_setting(text)
    assert found == value and type(found) is type(value)


def test_not_a_number_is_a_number():
    assert math.isnan(parse_setting(".NaN"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: 1\nb: {c: 1,\n c: 2}", r"key 'c' stands twice in one mapping \(line 3\)"),
        ("1: a\n01: b", r"key '01' stands twice"),
        ("a: 1\n'a': 2", r"key 'a' stands twice"),
        ("a:\n  b:\n  # c: 1\n", r"nothing stands after the key 'b' \(line 2\): write \{\} .* or null"),
        ("a: {b}", r"nothing stands after the key 'b'"),
        ("x: &x {a: 1}\ny: {<<: *x, <<: *x}", r"key '<<' stands twice"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml.*" + message):
        read_yaml(path)


def test_a_merged_mapping_may_be_merged_again_and_its_values_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {lr: 1, b: 2}\nx: {deep: &deep {<<: *base, lr: 3}}\ny: {<<: *deep, lr: 4}\n")
    raw = read_yaml(path)
    assert raw["x"]["deep"] == {"lr": 3, "b": 2} and raw["y"] == {"lr": 4, "b": 2}
