"""The arithmetic of the passes over memory against plain formulas, and compiled kernels against uncompiled ones."""

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from small_runs import ALWAYS, identical, missing_for_compilation

import aadl
from aadl import compilation, kernels

DEPTH = 4


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- storing a pair ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aliased", [False, True], ids=["own start", "start at the mapped iterate"])
@pytest.mark.parametrize("ratio", [1.0, 0.9])
@pytest.mark.parametrize("ring", [torch.float64, torch.float32, torch.bfloat16])
def test_a_pair_is_stored_as_differences(aliased, ratio, ring):
    value, start, f, g = numbers(4, 50)
    start = g if aliased else start
    new = value - start
    delta_f, delta_g = new - ratio * f, value - (g + (ratio - 1) * f)
    other = new - (1.9 - ratio) * f
    residual, mapped = f.clone(), g.clone()
    rows = torch.full((2, 50), 7.0, dtype=ring)
    kernels.store(value, mapped if aliased else start, residual, mapped, (rows[0], rows[1]), ratio)
    coarseness = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[ring]
    for row, expected in zip(rows, (delta_f, delta_g), strict=True):
        assert torch.allclose(row.double(), expected, rtol=coarseness, atol=1e-14)
    assert not torch.allclose(rows[0].double(), other, rtol=0.02)
    assert torch.equal(residual, new) and torch.equal(mapped, value)


@pytest.mark.parametrize("aliased", [False, True])
def test_the_first_pair_has_no_differences(aliased):
    value, start, f, g = numbers(4, 50)
    residual, mapped = f.clone(), g.clone()
    kernels.store(value, mapped if aliased else start, residual, mapped, None, 1.0)
    assert torch.equal(residual, value - (g if aliased else start)) and torch.equal(mapped, value)
    mapped = g.clone()
    kernels.store(value, mapped if aliased else start, None, mapped, None, 1.0)
    assert torch.equal(mapped, value)


@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("ring", [torch.float64, torch.bfloat16])
def test_without_residuals_only_the_mapped_iterates_are_kept(aliased, ring):
    value, start, _, g = numbers(4, 50)
    mapped, row = g.clone(), torch.zeros(50, dtype=ring)
    kernels.store(value, mapped if aliased else start, None, mapped, (None, row), 1.0)
    assert torch.equal(row, (value - g).to(ring)) and torch.equal(mapped, value)
    assert not torch.equal(row, (value - start).to(ring))


# ---- inner products ------------------------------------------------------------------------------------------------

SLOTS = [[], [2], [3, 0], [0, 1, 2, 3]]


def expected_products(ring, residual, filled, slots):
    wide = torch.cat([ring[:filled], residual[None].to(ring.dtype)]).double()
    wide[-1] = residual.double()
    return wide[[*slots, filled]] @ wide.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inner_products_are_those_of_float64(dtype):
    piece = kernels.WIDE_PIECE
    for slots, numel, filled in itertools.product(SLOTS, (0, 1, piece - 1, piece, 2 * piece + 5), (4, 6)):
        ring, residual = numbers(6, numel, dtype=dtype), numbers(numel, dtype=torch.float32, seed=1)
        products = kernels.inner_products(ring, residual, filled, slots, False)
        expected = expected_products(ring, residual, filled, slots)
        case = slots, numel, filled
        assert products.dtype == torch.float64, case
        assert products.shape == expected.shape == (len(slots) + 1, filled + 1), case
        assert torch.allclose(products, expected, rtol=1e-12, atol=1e-9), case
        assert numel < 2 or not torch.allclose(products, expected.flip(1), rtol=1e-3), case


# ---- combination ---------------------------------------------------------------------------------------------------


def problem(numel, ring=torch.float64, dtype=torch.float64):
    """Vectors and coefficients of a combination with everything in it."""
    base, residual = numbers(2, numel, dtype=dtype)
    mapped_ring, residual_ring = numbers(2, DEPTH, numel, dtype=ring, seed=1)
    a, b, mean = numbers(3, DEPTH, seed=2)
    return base, residual, mapped_ring, residual_ring, a, b, mean


def combined(given, numel, *, terms=2, factor=0.3, along=True, fused=False):
    """(out, advance) of the kernel, and in float64 by the formulas."""
    base, residual, mapped_ring, residual_ring, a, b, mean = given
    used = [(mapped_ring, a), (residual_ring, b)][:terms]
    rows = [residual_ring[i] for i in (1, 3)]
    update = (residual, rows, mean[[1, 3]]) if along else None
    out = torch.full_like(base, float("nan"))
    advance = kernels.combine(out, base, used, (residual, factor) if factor else None, update, fused)
    change = -factor * residual.double() - sum(numbers @ ring.double() for ring, numbers in used)
    direction = residual.double() - mean[[1, 3]] @ torch.stack(rows).double()
    return (out, advance), (base.double() + change, change @ direction if along else None)


@pytest.mark.parametrize("numel", [0, 1, 1000, 2 * kernels.COMBINE_PIECE, 2 * kernels.COMBINE_PIECE + 3])
@pytest.mark.parametrize("ring", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("terms", "factor", "along"), [(1, 0.0, False), (2, 0.0, True), (1, 0.3, True), (2, 0.3, True)]
)
def test_the_combination_is_the_formula(numel, ring, terms, factor, along):
    given = problem(numel, ring)
    (out, advance), (expected, expected_advance) = combined(given, numel, terms=terms, factor=factor, along=along)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    assert (advance is None) != along
    if along:
        assert advance.shape == () and advance.dtype == torch.float64
        assert float(advance) == pytest.approx(float(expected_advance), rel=1e-10, abs=1e-9)
    _, (without, _) = combined(given, numel, terms=terms, factor=factor + 0.1, along=along)
    assert numel == 0 or not torch.allclose(out, without)


@pytest.mark.parametrize("coefficients", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3]])
def test_coefficients_that_are_zero_cost_nothing_and_change_nothing(coefficients):
    base, _, ring, _, _, _, _ = problem(100)
    out, a = torch.empty(100, dtype=torch.float64), torch.tensor(coefficients, dtype=torch.float64)
    last = max((i for i, number in enumerate(coefficients) if number), default=0)
    ring[last + 1 :] = float("inf")  # rows behind the last one that counts are not read
    assert kernels.combine(out, base, [(ring, a)], None, None, False) is None
    assert torch.allclose(out, base - a[: last + 1] @ ring[: last + 1])
    assert torch.equal(out, base) != any(coefficients)


# ---- compiled kernels ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler():
    if missing_for_compilation():
        pytest.skip(missing_for_compilation())


@pytest.fixture
def unbroken(monkeypatch):
    """As if nothing had been compiled in this process yet."""
    monkeypatch.setattr(compilation, "failures", [])


@pytest.mark.slow
@pytest.mark.usefixtures("compiler", "unbroken")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_inner_products_are_those_of_the_plain_kernel(dtype):
    # A float32 sum of n products is wrong by at most n 2^-24 of the sum of their sizes, in whatever order.
    coarseness = kernels.SUM_BLOCK * 2**-24 if dtype == torch.bfloat16 else 1e-13
    for numel in (4096, 10_000):
        ring, residual = numbers(DEPTH, numel, dtype=dtype), numbers(numel, dtype=torch.float32, seed=1)
        for slots in ([2], [0, 1, 2, 3]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of the compiler
                fused = kernels.inner_products(ring, residual, DEPTH, slots, True)
            assert compilation.failure() == ""
            plain = kernels.inner_products(ring, residual, DEPTH, slots, False)
            norms = torch.cat([ring.double().norm(dim=1), residual.double().norm()[None]])
            scales = norms[[*slots, DEPTH]].outer(norms)
            assert fused.shape == plain.shape and fused.dtype == torch.float64
            assert ((fused - plain).abs() <= coarseness * scales).all()
            assert not ((fused.flip(0) - plain).abs() <= 1e-2 * scales).all()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler", "unbroken")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_combination_is_that_of_the_plain_kernel(dtype):
    for numel in (4096, 10_000):
        given = problem(numel, dtype, torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (fused, advance), (expected, exact) = combined(given, numel, fused=True)
        assert compilation.failure() == ""
        (plain, other), _ = combined(given, numel)
        for out in (fused, plain):
            assert torch.allclose(out.double(), expected, rtol=1e-6, atol=1e-5)
        assert float(advance) == pytest.approx(float(exact), rel=1e-5)
        assert float(other) == pytest.approx(float(exact), rel=1e-5)
        assert not torch.allclose(fused.double(), combined(given, numel, factor=0.31)[1][0], rtol=1e-6, atol=1e-3)


def quadratic_run(steps=12, **settings):
    """SGD on a quadratic of 5000 variables."""
    x = torch.nn.Parameter(torch.ones(5000))
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.5), **ALWAYS | settings)
    weights = torch.logspace(-2, 0, 5000)
    for _ in range(steps):
        x.grad = weights * x.detach()
        optimizer.step()
    return x.detach(), aadl.accelerator_of(optimizer), optimizer


class Failing:
    """In place of torch.compile."""

    def __init__(self, when):
        self.when, self.calls = when, 0

    def __call__(self, function, variant):
        self.calls += 1
        if self.when == "at once":
            raise RuntimeError("no compiler\nand a long story")
        return self._fail

    def _fail(self, *arguments):
        raise OSError("no space left\nin the cache")


@pytest.mark.parametrize(
    ("when", "message"), [("at once", "RuntimeError: no compiler"), ("later", "OSError: no space")]
)
def test_a_compilation_that_fails_warns_once_and_changes_no_number(when, message, monkeypatch, unbroken):
    failing = Failing(when)
    monkeypatch.setattr(compilation, "compiled", failing)
    ring, residual = numbers(DEPTH, 5000, dtype=torch.float32), numbers(5000, dtype=torch.float32, seed=1)
    printed = f"goes on with uncompiled kernels, torch.compile failed: {message}"
    with pytest.warns(UserWarning, match=printed) as caught:
        fused = kernels.inner_products(ring, residual, DEPTH, [1, 2], True)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert compilation.failure().startswith(message)
    assert torch.equal(fused, kernels.inner_products(ring, residual, DEPTH, [1, 2], False))
    given = problem(5000, torch.bfloat16, torch.float32)
    assert identical(combined(given, 5000, fused=True)[0], combined(given, 5000)[0])  # without another warning
    assert failing.calls == 1


@pytest.mark.usefixtures("compiler", "unbroken")
def test_an_accelerated_run_with_compiled_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused, accelerator, optimizer = quadratic_run(fused=True, safeguard="residual")
    assert accelerator.uses_compiled_kernels and compilation.failure() == ""
    plain, other, _ = quadratic_run(fused=False, safeguard="residual")
    assert not other.uses_compiled_kernels
    assert torch.allclose(fused, plain, rtol=1e-4, atol=1e-5)
    assert accelerator.statistics["accepted"] == other.statistics["accepted"] > 1
    assert not torch.allclose(plain, quadratic_run(history_depth=0)[0], rtol=1e-2)
    aadl.remove_acceleration(optimizer)
    assert not accelerator.uses_compiled_kernels


DOUBLED_SUM = """
import torch
from aadl import compilation
print(float(compilation.run_compiled(lambda vector: (2 * vector).sum(), torch.arange(1000.0))))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_cache_that_processors_share_never_gives_kernels_for_other_vector_instructions(tmp_path):
    """torch 2.13 by itself hands the second process kernels of the first one, which then add half of the numbers."""
    fewer = "avx2" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "default"
    for capability in ({}, {"ATEN_CPU_CAPABILITY": fewer}):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | capability
        command = [sys.executable, "-c", DOUBLED_SUM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.stdout.strip() == "999000.0", done.stderr


@pytest.mark.parametrize("numel", [4095, 4096, 2_000_000])
@pytest.mark.parametrize("arguments", [{}, {"fused": False}, {"fused": True}], ids=str)
def test_kernels_are_compiled_only_where_that_was_asked_for(numel, arguments, monkeypatch, unbroken):
    """Nobody waits for a compiler who did not ask for one, and short rows would never earn it."""
    calls = []
    monkeypatch.setattr(compilation, "compiled", lambda function, variant: calls.append(function) or function)
    x = torch.nn.Parameter(torch.ones(numel))
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.5), **ALWAYS | {"history_depth": 2} | arguments)
    for _ in range(4):
        x.grad = torch.linspace(0.1, 1, numel) * x.detach()
        optimizer.step()
    accelerator, asked = aadl.accelerator_of(optimizer), arguments.get("fused", False) and numel >= 4096
    assert accelerator.statistics["accepted"] > 0
    assert accelerator.uses_compiled_kernels == bool(calls) == asked
