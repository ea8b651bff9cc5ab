from itertools import pairwise

import pytest
import torch
from small_runs import train
from torch.nn.parallel import DistributedDataParallel

from experiments.settings.run_config import PublishedConfig
from experiments.training.published import PublishedScheme, extrapolate


def linear_map(size=4, largest=0.95, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.linspace(0.1, largest, size, dtype=torch.float64)) @ basis.T
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64)


def iterate(matrix, offset, num_steps, settings=None):
    """Gradient descent of rate 1 on the quadratic whose step is x -> matrix x + offset; gives error, scheme, rows."""
    x = torch.nn.Parameter(torch.zeros_like(offset))
    optimizer = torch.optim.SGD([x], lr=1.0)
    hessian = torch.eye(len(offset), dtype=offset.dtype) - matrix
    rows = []
    scheme = PublishedScheme(optimizer, settings) if settings is not None else None
    train(
        x,
        optimizer,
        num_steps,
        with_closure=True,
        loss=lambda x: 0.5 * x @ hessian @ x - offset @ x,
        after=lambda step: rows.append(x.detach().clone()),
    )
    error = float(torch.linalg.vector_norm(x.detach() - torch.linalg.solve(hessian, offset)))
    return error, scheme, rows


def test_a_window_of_true_iterates_solves_a_linear_map():
    matrix, offset = linear_map(size=4)
    columns = [torch.zeros(4, dtype=torch.float64)]
    for _ in range(5):
        columns.append(matrix @ columns[-1] + offset)
    solution = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, offset)
    window = torch.stack(columns, dim=1)  # 6 iterates: 4 second differences in dimension 4
    assert torch.allclose(extrapolate(window, 1.0, 0.0), solution, atol=1e-7)
    assert torch.allclose(extrapolate(window, 0.5, 0.0), solution, atol=1e-7)  # the residual is zero there
    assert not torch.allclose(extrapolate(window, 1.0, 1.0), solution, atol=1e-3)  # a ridge keeps away from it


def test_relaxation_leads_from_the_mean_of_iterates_to_the_mean_of_images():
    window = torch.randn(5, 4, dtype=torch.float64)
    full, half, tenth = (extrapolate(window, relaxation, 0.0) for relaxation in (1.0, 0.5, 0.1))
    assert torch.allclose((full - half) / 0.5, (half - tenth) / 0.4)
    assert not torch.allclose(full, half)


def test_it_converges_when_the_period_reaches_the_depth():
    matrix, offset = linear_map()
    plain, _, _ = iterate(matrix, offset, 60)
    fast, scheme, _ = iterate(matrix, offset, 60, PublishedConfig(history_depth=6, frequency=6))
    assert fast < 1e-6 * plain
    assert scheme.statistics["accepted"] == scheme.statistics["attempts"] == 10


def test_it_stalls_when_accepted_points_stand_inside_the_window():
    """The reason for the library: after acceptance the differences of the window are no residuals."""
    matrix, offset = linear_map(size=30, largest=0.99)
    plain, _, _ = iterate(matrix, offset, 100)
    often, _, _ = iterate(matrix, offset, 100, PublishedConfig(history_depth=6, frequency=1))
    seldom, _, _ = iterate(matrix, offset, 100, PublishedConfig(history_depth=6, frequency=6))
    assert seldom < 1e-2 * plain
    assert often > plain


def test_the_window_holds_iterates_and_the_accepted_point_replaces_the_newest():
    matrix, offset = linear_map()
    _, scheme, rows = iterate(matrix, offset, 10, PublishedConfig(history_depth=5, frequency=10))
    assert torch.equal(torch.stack(list(scheme.windows[0])), torch.stack(rows[-5:]))
    mapped = matrix @ rows[-2] + offset
    assert not torch.allclose(scheme.windows[0][-1], mapped)  # the image itself is gone


def test_every_nth_iterate_is_stored():
    matrix, offset = linear_map()
    _, scheme, rows = iterate(matrix, offset, 12, PublishedConfig(store_each_nth=3, frequency=100))
    assert torch.equal(torch.stack(list(scheme.windows[0])), torch.stack(rows[2::3]))


def test_the_safeguard_never_raises_the_loss():
    matrix, offset = linear_map(size=30, largest=0.999)
    settings = PublishedConfig(history_depth=6, frequency=2, safeguard=True)
    _, scheme, rows = iterate(matrix, offset, 60, settings)
    hessian = torch.eye(30, dtype=torch.float64) - matrix
    losses = [float(0.5 * x @ hessian @ x - offset @ x) for x in rows]
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    statistics = scheme.statistics
    assert statistics["accepted"] + sum(statistics["rejected"].values()) == statistics["attempts"] > 0


def test_waiting_equals_the_optimizer_alone():
    matrix, offset = linear_map()
    _, _, plain = iterate(matrix, offset, 20)
    _, _, waiting = iterate(matrix, offset, 20, PublishedConfig(wait_iterations=20, frequency=5))
    _, _, active = iterate(matrix, offset, 20, PublishedConfig(wait_iterations=1, frequency=5))
    assert torch.equal(plain[-1], waiting[-1])
    assert not torch.equal(plain[-1], active[-1])


def test_the_average_of_the_window_is_written_over_the_weights():
    matrix, offset = linear_map()
    off = PublishedConfig(frequency=100, average=True, average_tolerance=1e9)
    always = PublishedConfig(frequency=100, average=True, average_tolerance=0.0)
    _, _, plain = iterate(matrix, offset, 3)
    _, scheme, kept = iterate(matrix, offset, 3, off)
    assert torch.equal(plain[-1], kept[-1]) and not scheme.statistics["averaging"]
    _, scheme, averaged = iterate(matrix, offset, 2, always)
    assert torch.allclose(averaged[0], plain[0])  # one iterate alone has no deviation
    assert torch.allclose(averaged[1], 0.5 * (plain[0] + plain[1])) and scheme.statistics["averaging"]


def test_a_restored_scheme_has_the_iterates_of_the_window_and_of_the_average():
    settings = PublishedConfig(history_depth=4, frequency=100, average=True, average_tolerance=0.0)
    _, scheme, _ = iterate(*linear_map(), 7, settings)
    _, again, _ = iterate(*linear_map(seed=1), 2, settings)
    again.load_state_dict(scheme.state_dict())
    for own, saved in ((again.windows, scheme.windows), (again.raw, scheme.raw)):
        assert torch.equal(torch.stack(list(own[0])), torch.stack(list(saved[0])))


def test_a_point_that_is_not_finite_is_rejected():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([x], lr=0.0)
    scheme = PublishedScheme(optimizer, PublishedConfig(frequency=3))
    for value in (1e38, -3e38, 3e38):
        with torch.no_grad():
            x.fill_(value)
        x.grad = torch.zeros(3)
        optimizer.step()
    assert scheme.statistics["attempts"] == 1 and scheme.statistics["rejected"]["non_finite"] == 1
    assert x.isfinite().all()


def test_trial_evaluations_are_counted():
    matrix, offset = linear_map()
    settings = PublishedConfig(history_depth=5, frequency=5, safeguard=True)
    _, scheme, _ = iterate(matrix, offset, 10, settings)
    assert scheme.statistics["closure_evaluations"] == 2 * scheme.statistics["attempts"] == 4
    _, scheme, _ = iterate(matrix, offset, 10, PublishedConfig(history_depth=5, frequency=5))
    assert scheme.statistics["attempts"] == 2 and scheme.statistics["closure_evaluations"] == 0


def trained_by_ranks(rank, world_size, safeguard):
    """Weights and statistics of a rank after steps with rows of its own and averaged gradients."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = PublishedConfig(wait_iterations=0, history_depth=4, frequency=2, safeguard=safeguard)
    scheme = PublishedScheme(optimizer, settings)
    wrapped = DistributedDataParallel(model)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(rank))
    target = (1 + rank) * inputs.sum(1, keepdim=True)
    train(wrapped, optimizer, 30, with_closure=True, loss=lambda model: (model(inputs) - target).square().mean())
    return [p.detach().clone() for p in model.parameters()], scheme.statistics


@pytest.mark.parametrize("safeguard", [False, True])
def test_ranks_take_the_same_points(spawn_ranks, safeguard):
    (first, counts), (second, others) = spawn_ranks(trained_by_ranks, 2, safeguard)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    assert all(counts[name] == others[name] for name in ("attempts", "accepted", "rejected"))
    assert counts["attempts"] > 5 and counts["accepted"] > 0
