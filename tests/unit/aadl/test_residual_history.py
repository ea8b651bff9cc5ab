"""The ring of weights and residuals: each comparison counts once, and a forgotten column is used no more."""

import torch
from residual_runs import residuals_of, started, train


def filled():
    """(residuals of the newest pair, history) after three steps, each of which has stored a pair."""
    model, optimizer, accelerator = started(observe=False, frequency=100)
    train(model, optimizer, 3, observe=False)
    return residuals_of(model).detach().view(-1), accelerator.history


def test_residuals_seen_twice_at_the_same_weights_are_compared_once():
    residuals, history = filled()
    history.compare(2 * residuals)
    found = [history.products() for _ in range(2)]
    assert [(products.doubt, products.compared) for products in found] == [(1.0, True), (0.0, False)]


def test_the_column_of_a_pair_that_is_stored_twice_can_be_forgotten():
    residuals, history = filled()
    history.take(torch.tensor(False), residuals)
    assert history.num_columns == 3
    history.drop_newest_column()
    assert history.num_columns == len(history.products().slots) == 2
