"""Small softmax regressions for the tests."""

import numpy as np

from soups.second_order.softmax_regression import Problem


def made(rows=60, classes=3, numbers=4, seed=0, truth=None, beta=1.0, **changes):
    """Rows whose labels are drawn from the model itself at `truth`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, classes))
    derivatives = random.normal(size=(rows, classes, numbers))
    theta = np.zeros(numbers) if truth is None else truth
    scores = beta * (logits + derivatives @ theta) + random.gumbel(size=(rows, classes))
    scales = np.linspace(1, 2, numbers)
    first = np.arange(numbers) < numbers // 2
    penalties = np.stack([np.diag(scales * first), np.diag(scales * ~first)])
    given = {"penalties": penalties} | changes
    return Problem(logits, derivatives, scores.argmax(1), **given)
