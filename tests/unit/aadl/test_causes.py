"""Every cause has one place: the enumeration, with a docstring, a cure, and a word on the page of the method."""

import ast
import inspect
import itertools
from pathlib import Path

import pytest

from aadl import acceptance
from aadl.acceptance import Cause
from aadl.advice import CURES

ROOT = Path(acceptance.__file__).parent


def documented():
    """Names in the enumeration that a docstring follows."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(Cause)).body)
    pairs = itertools.pairwise(body)
    return {
        first.targets[0].id
        for first, second in pairs
        if isinstance(first, ast.Assign) and isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
    }


def test_every_cause_is_explained_and_has_a_cure():
    assert documented() == {cause.name for cause in Cause}
    assert set(CURES) == set(Cause)


def test_statistics_count_plain_text():
    counts = {}
    acceptance.count(counts, Cause.LOSS)
    acceptance.count(counts, Cause.LOSS)
    assert counts == {"loss": 2} and type(next(iter(counts))) is str


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_other_file_writes_a_cause_as_text(path):
    """Else somebody who looks for the cause of a rejection would not find who counts it."""
    source = path.read_text("utf-8")
    words = {cause.value for cause in Cause} - {"residuals", "check", "loss", "user"}  # also names of arguments
    found = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words
    }
    allowed = {"acceptance.py": words, "statistics.py": {"moved"}, "decisions.py": {"moved"}}
    allowed |= {"macro_steps.py": {"moved"}, "advice.py": {"moved"}, "residual_history.py": {"rank"}}
    allowed |= {"learning_rates.py": {"learning_rate"}}
    assert found <= allowed.get(path.name, set())
