"""The progress of a solve on the command line, and the time that is left."""

import pytest
from tests.results.fake_results import fake_progress

from curvax.cli.display import seconds_left, show_progress


def test_products_after_the_first_certificate_stay_sparse(capsys):
    with show_progress(quiet=False, phase="compiling") as display:
        for step in range(56, 90):
            display.update(fake_progress(step))
    assert capsys.readouterr().err.splitlines() == [
        "compiling",
        "56 products  14/15 pairs  residual 1.6e-03  left ?",
        "60 products  15/15 pairs  measuring residuals",
    ]


def test_time_left_extrapolates_the_residual():
    # A tenth every 20 products of 0.2 s, from 1e-1 to 1e-3: two decades at 4 s each.
    history = [fake_progress(step) for step in range(10, 21)]
    assert seconds_left(history, budgeted=False) == pytest.approx(8.0)


def test_time_left_is_unknown_without_progress():
    flat = [fake_progress(step, residual=0.5) for step in range(1, 12)]
    infinite = [fake_progress(step, residual=float("inf")) for step in range(1, 12)]
    for history in ([], flat[:1], flat, infinite):
        assert seconds_left(history, budgeted=False) is None


def test_time_left_ends_with_the_budget():
    history = [fake_progress(step, residual=0.5, max_matvecs=30) for step in range(1, 11)]
    assert seconds_left(history, budgeted=True) == pytest.approx(20 * 0.2)
