"""Ways to the derivatives of a PINN, loss and backward: `python -m benchmarks.pinn_operators` (`--quick`: seconds).

The residual u_t + u sum_i u_{x_i} - sum_i u_{x_i x_i} - f of a network d-50-50-50-1, tanh, at 4,000 points, its mean
square and the gradient of that (one thread). Each row has its own process.
--docs puts the tables into docs/reports/pinn_operators.md. It takes some four minutes and up to 4 GB of memory.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.machine import in_fresh_process, peak_bytes, resident_bytes
from benchmarks.tables import Table, middle, number, origin, put_into_page, rows_of, with_range
from experiments.models.mlp import MLP, Derivatives

HIDDEN = (50, 50, 50)
HIDDEN_2D = (20,) * 8
POINTS, POINTS_2D = 4000, 4096
NUM_RANDOM = 16
VISCOSITY_2D = 0.01 / torch.pi
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# ---- ways ------------------------------------------------------------------------------------------------------------

Residual = Callable[[MLP, Tensor, Tensor], Tensor]
"""Network, points (N, d) with time last, source f (N, 1) -> residual (N, 1)."""


def burgers(u: Derivatives, source: Tensor) -> Tensor:
    """u_t + u sum_i u_{x_i} - nu Laplacian - f, nu = 1, or that of the 2d problem where it gets no source."""
    viscosity = 1.0 if source.numel() else VISCOSITY_2D
    left = u.time + u.value * u.gradient_sum - viscosity * u.laplacian
    return left - source if source.numel() else left


def _composed(value: Tensor, gradient: Tensor, laplacian: Tensor, source: Tensor) -> Tensor:
    space = gradient[:, :-1].sum(1, keepdim=True)
    return burgers(Derivatives(value, gradient[:, -1:], space, laplacian, space), source)


def by_loop(model: MLP, points: Tensor, source: Tensor) -> Tensor:
    """One call of autograd.grad for the gradient and one for every second derivative."""
    points = points.clone().requires_grad_()
    value = model(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    laplacian = torch.zeros_like(value)
    for column in range(points.shape[1] - 1):
        (row,) = torch.autograd.grad(gradient[:, column].sum(), points, create_graph=True)
        laplacian = laplacian + row[:, column : column + 1]
    return _composed(value, gradient, laplacian, source)


def by_jvp_of_grad(model: MLP, points: Tensor, source: Tensor) -> Tensor:
    """torch.func.jvp of torch.func.grad, vmapped over the axes."""
    gradient = torch.func.grad(lambda x: model(x).sum())

    def second(axis: Tensor) -> Tensor:
        return (torch.func.jvp(gradient, (points,), (axis.expand_as(points),))[1] * axis).sum(1)

    axes = torch.eye(points.shape[1], dtype=points.dtype)[:-1]
    laplacian = torch.func.vmap(second)(axes).sum(0).unsqueeze(1)
    return _composed(model(points), gradient(points), laplacian, source)


def forward(
    model: MLP, points: Tensor, source: Tensor, axes: Tensor | None = None, *, compiles: bool = False
) -> Tensor:
    """Forward propagation along `axes` (d - 1, r), or an orthonormal basis of the rows of the first layer."""
    return burgers(model.derivatives(points, axes, gradient_square=False, compiles=compiles), source)


def by_axes(model: MLP, points: Tensor, source: Tensor) -> Tensor:
    """Along all axes, without compression."""
    return forward(model, points, source, torch.eye(points.shape[1] - 1, dtype=points.dtype))


def by_random_axes(model: MLP, points: Tensor, source: Tensor) -> Tensor:
    """Along some random axes, an unbiased estimate (STDE, arXiv 2412.00088)."""
    num_space = points.shape[1] - 1
    chosen = torch.randperm(num_space)[:NUM_RANDOM]
    axes = points.new_zeros(num_space, len(chosen))
    axes[chosen, torch.arange(len(chosen))] = (num_space / len(chosen)) ** 0.5
    return forward(model, points, source, axes)


WAYS: dict[str, tuple[Residual, str]] = {
    "loop": (by_loop, "loop of autograd.grad"),
    "jvp": (by_jvp_of_grad, "torch.func: vmap(jvp(grad))"),
    "axes": (by_axes, "forward Laplacian, all axes"),
    "random": (by_random_axes, f"STDE, {NUM_RANDOM} random axes (an estimate)"),
    "compressed": (forward, "forward Laplacian, compressed"),
    "compiled": (partial(forward, compiles=True), "compressed + torch.compile"),
}


# ---- one row, in a process of its own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row: `columns` are all inputs, time included; `points` are measured, `checked` compared with the loop."""

    way: str
    columns: int
    dtype: str = "float32"
    points: int = POINTS
    repeats: int = 5
    checked: int = 16

    @property
    def planar(self) -> bool:
        """Whether it is the 2d problem."""
        return self.columns == 2

    @property
    def scale(self) -> float:
        """What the time is multiplied with, to be that of all points."""
        return (POINTS_2D if self.planar else POINTS) / self.points


@dataclass(frozen=True)
class Row:
    """What a case measured: processor seconds of loss and backward, bytes, errors against autograd in float64."""

    case: Case
    seconds: Sequence[float]
    peak_bytes: int
    base_bytes: int
    residual_error: float
    gradient_error: float


def problem_of(case: Case, count: int) -> tuple[MLP, Tensor, Tensor]:
    """Network, points and source of a case."""
    torch.manual_seed(0)
    model = MLP((case.columns, *(HIDDEN_2D if case.planar else HIDDEN), 1)).to(DTYPES[case.dtype])
    points = 0.5 * torch.randn(count, case.columns, dtype=DTYPES[case.dtype])
    return model, points, torch.zeros(0) if case.planar else points[:, :2].prod(1, keepdim=True)


def loss_and_backward(case: Case, model: MLP, points: Tensor, source: Tensor) -> None:
    """What is timed: so many points at a time as are fastest for the way."""
    model.zero_grad()
    if case.way in ("compressed", "compiled"):
        for rows, u in model.chunked_derivatives(points, gradient_square=False, compiles=case.way == "compiled"):
            (burgers(u, source[rows]).square().sum() / len(points)).backward()
        return
    lanes = 3 + (min(NUM_RANDOM, case.columns) if case.way == "random" else case.columns)
    fitting = max(16, (1 << 21) // (lanes * HIDDEN[0] * points.itemsize))  # the working set of the library's own
    chunk = {"loop": len(points), "jvp": 400}.get(case.way, fitting)
    for start in range(0, len(points), chunk):
        rows = slice(start, start + chunk)
        residual = WAYS[case.way][0](model, points[rows], source[rows])
        (residual.square().sum() / len(points)).backward()


def measure(case: Case) -> Row:
    """Time, then memory, then agreement."""
    base = resident_bytes() or 0
    problem = problem_of(case, case.points)
    loss_and_backward(case, *problem)
    times = []
    for _ in range(case.repeats):
        start = time.process_time()
        loss_and_backward(case, *problem)
        times.append(case.scale * (time.process_time() - start))
    peak = peak_bytes() or 0
    del problem
    return Row(case, times, peak, base, *errors(case))


def errors(case: Case) -> tuple[float, float]:
    """Relative errors of residual and gradient of the mean square, in the 2-norm, against the loop in float64."""
    model, points, source = problem_of(case, case.checked)
    exact = copy.deepcopy(model).double()
    ours = _residual_and_gradient(WAYS[case.way][0], model, points, source)
    theirs = _residual_and_gradient(by_loop, exact, points.double(), source.double())
    first, second = ((float((a.double() - b).norm() / b.norm())) for a, b in zip(ours, theirs, strict=True))
    return first, second


def _residual_and_gradient(way: Residual, model: MLP, points: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    residual = way(model, points, source)
    gradients = torch.autograd.grad(
        residual.square().mean(), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return residual.detach(), torch.cat([each.flatten() for each in gradients])


# ---- report ----------------------------------------------------------------------------------------------------------

FORWARD = ("random", "compressed", "compiled")


def all_cases(quick: bool) -> list[Case]:
    """All rows, in the order of the tables."""
    if quick:
        return [
            Case(way, columns, points=200, repeats=2)
            for columns, ways in ((20, ("loop", "compressed", "random")), (2, ("loop", "compressed")))
            for way in ways
        ]
    return [
        *(Case(way, 100, repeats=15 if way in FORWARD else 5) for way in WAYS),
        *(Case(way, 100, "float64") for way in ("loop", "axes", "compressed", "compiled")),
        Case("loop", 1000, points=POINTS // 10, repeats=2),
        *(Case(way, 1000) for way in ("axes", *FORWARD)),
        *(Case(way, 10_000, checked=2) for way in FORWARD),
        *(Case(way, 2, dtype, POINTS_2D, 40) for dtype in DTYPES for way in ("loop", "compressed", "compiled")),
    ]


HEADER = ["d", "type", "way", "ms [least .. most]", "times the loop", "peak MB", "residual error", "gradient error"]


def table(rows: Sequence[Row], planar: bool) -> list[list[str]]:
    """Cells of the rows of one table; the ratio is to the loop of the same d and type."""
    chosen = [row for row in rows if row.case.planar == planar]
    loops = {(row.case.columns, row.case.dtype): median(row.seconds) for row in chosen if row.case.way == "loop"}
    cells = []
    for row in chosen:
        case = row.case
        loop = loops.get((case.columns, case.dtype))
        name = "double autograd" if planar and case.way == "loop" else WAYS[case.way][1]
        name = name.replace(", compressed", "").replace("compressed", "forward") if planar else name
        scaled = f" ({case.points:,} points, time x {case.scale:g})" if case.scale != 1 else ""
        ratio = "-" if loop is None else f"{loop / median(row.seconds):.2f}"
        times = with_range([1e3 * each for each in row.seconds], number)
        accuracy = (f"{row.residual_error:.1e}", f"{row.gradient_error:.1e}")
        cells.append(
            [f"{case.columns:,}", case.dtype, name + scaled, times, ratio, f"{row.peak_bytes / 1e6:.0f}", *accuracy]
        )
    return cells


def blocks_of(rows: Sequence[Row]) -> dict[str, str]:
    """What docs/reports/pinn_operators.md has between its marks."""
    base = median(row.base_bytes for row in rows) / 1e6
    bare = f"Interpreter and torch take {base:.0f} MB of the peaks."
    return {
        "origin": f"{origin('python -m benchmarks.pinn_operators --docs')} {bare}",
        "wide": Table(f"Loss and backward, d-50-50-50-1, {POINTS:,} points", HEADER, table(rows, False)).markdown(),
        "planar": Table(f"Loss and backward, 2-20x8-1, {POINTS_2D:,} points", HEADER, table(rows, True)).markdown(),
    }


def conclusion(page: str) -> str:
    """The first sentences of docs/reports/pinn_operators.md, from its tables."""
    rows = {(row["d"], row["type"], row["way"]): row for block in ("wide", "planar") for row in rows_of(page, block)}
    compressed = [rows[d, "float32", WAYS["compressed"][1]] for d in ("100", "1,000", "10,000")]
    first, second, third = (middle(row["ms [least .. most]"]) for row in compressed)
    fast, compiled = (rows["100", "float32", WAYS[way][1]]["times the loop"] for way in ("compressed", "compiled"))
    planar, double = (rows["2", dtype, "forward Laplacian"]["times the loop"] for dtype in DTYPES)
    return (
        "A Laplacian costs as much in 10,000 dimensions as the products with the first layer do, because only that "
        f"layer sees the dimension: the compressed forward Laplacian takes {first} ms in 100, {second} ms in 1,000 and "
        f"{third} ms in 10,000 dimensions. In 100 dimensions it is {fast} times as fast as a loop of autograd.grad, "
        f"with torch.compile {compiled} times; in 2 dimensions {planar} times, in float64 {double} times, without "
        "compilation. Not measured on a GPU."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with --docs write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pinn_operators", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/reports/pinn_operators.md")
    parser.add_argument("--quick", action="store_true", help="small cases: seconds")
    options = parser.parse_args(arguments)
    if options.docs and options.quick:
        parser.error("--docs writes about all cases")
    torch.set_num_threads(1)
    rows = []
    for case in all_cases(options.quick):
        print(f"# {case.way}, d = {case.columns:,}, {case.dtype}", file=sys.stderr, flush=True)
        rows.append(in_fresh_process(measure, case))
    blocks = blocks_of(rows)
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("pinn_operators", blocks, conclude=conclusion)


if __name__ == "__main__":
    main()
