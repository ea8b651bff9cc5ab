"""Settings are strict, and a mistake is one sentence with the key, the value and what is allowed."""

import math
import os
import re
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from paths import ROOT
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from experiments.settings.kinds import Component, Different, Items, Name, Named, Seeds, must, one_of
from experiments.settings.schema import Settings, at, read_settings, refuse_unknown


class Part(Settings):
    size: PositiveInt = 1
    sizes: Items[PositiveInt] = ()


class Whole(Settings):
    seeds: Seeds
    rate: PositiveFloat = 1.0
    flag: bool = False
    word: Literal["tanh", "relu"] = "tanh"
    name: Annotated[str, one_of(["plain", "fast"])] = "plain"
    even: Annotated[int, AfterValidator(must("be even", lambda number: number % 2 == 0))] = 0
    different: Different[PositiveInt] = (1,)
    part: Part = Part()
    parts: dict[Name, Part] = Field(default={})
    optional: Part | None = None
    named: Named | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Any:
        if self.flag and self.word == "relu":
            raise ValueError("word must be tanh with flag, got 'relu'")
        return self


def read(**raw):
    return read_settings(Whole, {"seeds": 0} | raw, "top")


def test_good_settings_are_frozen_and_of_the_kinds_that_were_asked_for():
    settings = read(rate=3, different=[2, 1], optional={"sizes": [3]}, named={"name": "SGD", "betas": [0, 1]})
    assert type(settings.rate) is float and settings.different == (2, 1) and settings.optional.sizes == (3,)
    assert settings.named == Component("SGD", {"betas": (0, 1)})
    with pytest.raises(ValueError, match="frozen"):
        settings.rate = 2.0


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"rate": True}, "top.rate must be a number, got True"),
        ({"rate": "1"}, "top.rate must be a number, got '1'"),
        ({"rate": math.nan}, "top.rate must be a finite number, got nan"),
        ({"rate": math.inf}, "top.rate must be a finite number, got inf"),
        ({"rate": 0}, "top.rate must be greater than 0, got 0"),
        ({"flag": 1}, "top.flag must be true or false, got 1"),
        ({"even": 2.0}, "top.even must be an integer, got 2.0"),
        ({"even": "2"}, "top.even must be an integer, got '2'"),
        ({"even": 3}, "top.even must be even, got 3"),
        ({"word": "tan"}, "top.word must be one of tanh, relu, got 'tan'; did you mean tanh?"),
        ({"name": "plane"}, "top.name must be one of plain, fast, got 'plane'; did you mean plain?"),
        ({"part": [1]}, "top.part must be a mapping of settings, got [1]"),
        ({"part": {"sizes": [1, True]}}, "top.part.sizes[1] must be an integer, got True"),
        ({"part": {"sizes": 1}}, "top.part.sizes must be a list, got 1"),
        ({"different": []}, "top.different must have at least 1 item, got []"),
        ({"different": [1, 1]}, "top.different must have no entry twice, got [1, 1]"),
        ({"optional": {"size": 0}}, "top.optional.size must be greater than 0, got 0"),
        (
            {"optional": {"seize": 0}},
            "unknown key top.optional.seize; valid keys are: size (default 1), sizes (default ()); did you mean size?",
        ),
        ({"parts": {"a": {"sizes": "1"}}}, "top.parts.a.sizes must be a list, got '1'"),
        (
            {"parts": {"../a": {}}},
            "a name in top.parts must be a name of letters, digits, '_', '.' and '-' that starts with a letter, "
            "got '../a'",
        ),
        ({"flag": True, "word": "relu"}, "top: word must be tanh with flag, got 'relu'"),
        ({"named": "SGD"}, "top.named must be a mapping with a name and arguments, got 'SGD'"),
        ({"named": {"name": "SGD", "betas": [0, math.nan]}}, "top.named: betas must be finite, got [0, nan]"),
    ],
)
def test_a_mistake_is_one_sentence(raw, sentence):
    with pytest.raises(ValueError) as caught:
        read(**raw)
    assert str(caught.value) == sentence


def test_what_is_missing_or_unknown_is_named_without_a_section_too():
    with pytest.raises(ValueError, match=r"^seeds is missing$"):
        read_settings(Whole, {})
    with pytest.raises(ValueError, match=r"^unknown key seed; valid keys are: seeds, rate .*; did you mean seeds\?$"):
        read_settings(Whole, {"seed": 1})


@pytest.mark.parametrize(
    ("text", "seeds"), [(3, (3,)), ([2, 0], (2, 0)), ("0-3", (0, 1, 2, 3)), ("0, 2,4-5", (0, 2, 4, 5)), ("008", (8,))]
)
def test_seeds(text, seeds):
    assert read_settings(Seeds, text, "seeds") == seeds


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([0, 0], "must have no entry twice"),
        ("0,0", "must have no entry twice"),
        ([], "must have at least 1 item"),
        (-1, "[0] must be greater than or equal to 0, got -1"),
        (2**31, "[0] must be less than 2147483648"),
        ([0, True], "[1] must be an integer, got True"),
        *((raw, 'must be integers as 3, [0, 1, 2] or "0-9"') for raw in ("3-1", "", "1-", "a", True, 1.0, None)),
        ("0-99999999999", "at most 100000 of them, got '0-99999999999'"),
        ("0-99999,100000", "must have at most 100000 items, got '0-99999,100000'"),
    ],
)
def test_other_values_are_no_seeds(raw, message):
    with pytest.raises(ValueError, match=rf"^--array seeds.*{re.escape(message)}"):
        read_settings(Seeds, raw, "--array seeds")


def test_a_long_value_is_shortened():
    with pytest.raises(ValueError, match=r"^seeds must have at most 100000 items, got \[0, 1, .* \.\.\.$") as caught:
        read_settings(Seeds, list(range(200_000)), "seeds")
    assert len(str(caught.value)) < 300


def test_what_is_refused_elsewhere_gets_its_key():
    for refused, sentence in (
        ("must be even, got 3", "a.b must be even, got 3"),
        ("lr must be finite", "a.b: lr must be finite"),
        ("unknown key c; valid keys are: d", "unknown key a.b.c; valid keys are: d"),
    ):
        with pytest.raises(ValueError) as caught, at("a.b"):
            raise ValueError(refused)
        assert str(caught.value) == sentence
    with pytest.raises(ValueError, match=r"^unknown key a\.b; valid keys are: c \(default 1\), d$"), at("a"):
        refuse_unknown({"b": 1}, {"c": 1, "d": object()})


@pytest.mark.parametrize("command", [["experiments", "list"], ["jobs.submit", "--help"], ["jobs.scaling", "--help"]])
def test_an_old_pydantic_is_refused_in_one_sentence(tmp_path, command):
    (tmp_path / "pydantic.py").write_text("VERSION = '2.9.2'\ndef __getattr__(name): raise AttributeError(name)\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: pydantic must be at least 2.12, got 2.9.2: pip install --upgrade pydantic\n"
    code = "import jobs; print('jobs'); import jobs.submit"  # which ends no program
    whole = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (whole.returncode, whole.stdout) == (1, "jobs\n") and "ValueError: pydantic must be" in whole.stderr
