"""Every cause has one place, the enumeration (mypy refuses texts in its stead): with a docstring and a cure."""

import ast
import inspect
import itertools

from aadl import acceptance
from aadl.acceptance import Cause
from aadl.advice import CURES


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
