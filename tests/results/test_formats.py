"""Files of format 1, written by the version before format 2, against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.results.files import assert_same, rewrite

import curvax as cx

DATA = Path(__file__).parent / "data" / "format1"
VALUES = np.array([5.0, 3.0, 2.0, 1.0, -1.0, -4.0])
EPS = np.finfo(np.float64).eps


def old(name):
    """The result, and the facts and arrays of its file."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    facts = json.loads(str(arrays.pop("facts")))
    assert facts["format"] == 1
    return cx.load(DATA / name), facts["result"]["fields"], arrays


@pytest.mark.parametrize("path", sorted(DATA.glob("*.npz")), ids=lambda path: path.stem)
def test_saved_again_it_is_of_the_present_format_and_the_same(tmp_path, path):
    result = cx.load(path)
    npz, _ = result.save(tmp_path / "x")
    with np.load(npz) as stored:
        assert json.loads(str(stored["facts"]))["format"] == 2
    assert_same(cx.load(npz), result)


def test_eigenpairs_of_a_diagonal_matrix():
    result, fields, arrays = old("eigen")
    assert np.all(np.abs(result.eigenvalues - [30, 20]) <= result.residuals)
    largest = np.argmax(np.abs(result.eigenvectors), axis=1)
    np.testing.assert_array_equal(largest, [0, 1])
    for name in ("eigenvalues", "residuals", "estimated_errors", "tol_effective", "bounds"):
        np.testing.assert_array_equal(getattr(result, name), arrays[name])
    counts = fields["num_matvecs"]["fields"]
    assert (result.num_matvecs, result.num_verification) == (counts["solve"], 2)
    assert result.history[-1].matvecs == result.num_matvecs and result.all_converged
    assert result.seconds["total"] > 0 and "bounds" not in vars(result)


def test_blocks_of_eigenpairs():
    result, _, _ = old("blocks")
    np.testing.assert_allclose([result[name].eigenvalues[0] for name in "ab"], [5, -4], 10 * EPS)
    assert result.sizes == {"a": 4, "b": 2}
    assert (result.num_matvecs, result.num_verification) == (4 + 2, 2)
    assert result.all_converged and not result.interrupted


def test_a_trace_and_a_diagonal():
    assert abs(old("trace")[0].estimate - VALUES.sum()) <= 100 * EPS
    result, _, _ = old("diagonal")
    np.testing.assert_allclose(result.estimate["a"], VALUES[:4], 100 * EPS)
    np.testing.assert_allclose(result.estimate["b"], VALUES[4:], 100 * EPS)
    assert result.num_matvecs == 4 and result.seconds["total"] > 0


def test_a_density_of_mass_one():
    result, _, _ = old("density")
    assert result.nodes.shape == (2, 4) and result.num_matvecs == 8
    np.testing.assert_allclose(result.weights.sum(axis=1), 1, 100 * EPS)
    np.testing.assert_allclose(np.trapezoid(result.density, result.grid), 1, rtol=1e-3)
    np.testing.assert_allclose(result.cdf([-0.5, 11.5]), [0, 1], rtol=0, atol=100 * EPS)


def test_a_recurrence_and_its_basis():
    result, _, _ = old("lanczos")
    projected = result.basis @ np.diag(VALUES) @ result.basis.T
    np.testing.assert_allclose(np.diag(projected), result.alphas, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(np.diag(projected, 1), result.betas, rtol=0, atol=100 * EPS)
    assert result.num_matvecs == 3 and result.seconds == {} and not result.interrupted


def test_solutions():
    result, fields, _ = old("solution")
    np.testing.assert_allclose(result.x, 1 / VALUES[:4], 100 * EPS)
    # Four directions, the residual of the iteration, and the one that was measured.
    assert fields["num_matvecs"] == 6
    assert (result.num_matvecs, result.num_verification) == (5, 1)
    assert result.seconds == {"total": fields["seconds"]}
    failed, fields, _ = old("solution_unconverged")
    assert failed.num_matvecs + failed.num_verification == fields["num_matvecs"] == 14
    diagonal = np.arange(1.0, 30)
    residual = np.linalg.norm(1 - diagonal * failed.x) / np.sqrt(29)
    np.testing.assert_allclose(failed.relative_residual, residual, 1e-12)


@pytest.mark.parametrize("field", ["bounds", "num_matvecs"])
def test_what_format_1_must_have_is_asked_for(tmp_path, field):
    copy = tmp_path / "x.npz"
    copy.write_bytes((DATA / "eigen.npz").read_bytes())
    rewrite(copy, lambda facts: facts["result"]["fields"].pop(field))
    with pytest.raises(ValueError, match=rf"x\.npz is damaged, or was not written by.*{field}"):
        cx.load(copy)
