"""`EigenResult.measured`: pairs in any order become a result in descending order."""

import numpy as np
import pytest
from tests.results.fake_results import fake_progress, fake_result

from curvax.program import Clock
from curvax.results import EigenResult

FACTS = dict(
    complete=None,
    orthogonality=0.0,
    noise=0.0,
    num_matvecs=7,
    num_verification=4,
    num_restarts=0,
    block_size=1,
    seed=0,
)


def measured(values, vectors=lambda order: None, **changes):
    """A result whose arrays say at which place the solver had each pair."""
    places = np.arange(float(len(values)))
    arrays = dict(estimated_errors=places / 4, converged=places > 1, tol_effective=places / 2)
    clock, history = Clock("products"), [fake_progress(7)]
    options = FACTS | arrays | {"clock": clock, "history": history} | changes
    return EigenResult.measured(np.asarray(values), places, vectors, **options)


def test_everything_is_sorted_by_the_values_and_ties_keep_their_order():
    result = measured([1.0, -3.0, 4.0, 1.0], lambda order: np.eye(4)[order])
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(result.eigenvalues, [4, 1, 1, -3])
    np.testing.assert_array_equal(result.eigenvectors, np.eye(4)[order])
    np.testing.assert_array_equal(result.residuals, order)
    np.testing.assert_array_equal(result.estimated_errors, np.divide(order, 4))
    np.testing.assert_array_equal(result.tol_effective, np.divide(order, 2))
    np.testing.assert_array_equal(result.converged, [True, False, True, False])
    np.testing.assert_array_equal(result.indices, [1, 2, 3, -1])
    assert result.history == (fake_progress(7),) and isinstance(result.history, tuple)


def test_the_clock_is_read_after_the_vectors_were_made():
    clock = Clock("products")

    def vectors(order):
        with clock.part("products"):
            return order

    result = measured([1.0], vectors, clock=clock)
    assert result.seconds.keys() == {"compile", "products", "total"}
    assert 0 < result.seconds["products"] <= result.seconds["total"]


def test_bounds_are_the_residuals_and_nothing_that_one_could_set():
    result = fake_result([2.0, 1.0])
    assert result.bounds is result.residuals
    with pytest.raises(TypeError, match="bounds"):
        measured([1.0], bounds=np.ones(1))
