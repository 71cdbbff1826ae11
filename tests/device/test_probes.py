"""The random vectors: rows that depend on (seed, i) alone, and their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.columns import CHUNK
from curvax.device import probes
from curvax.program import Clock

EPS = float(np.finfo(np.float32).eps)
# Over a border of the pieces in which rows are drawn, and no multiple of a word of bits.
LONG = CHUNK + 37

distributions = pytest.mark.parametrize("distribution", probes.DISTRIBUTIONS)


def _draw(n, count, seed, first, distribution, dtype=jnp.float32):
    op = cx.from_matvec(lambda v: v, jax.ShapeDtypeStruct((n,), dtype))
    like = jnp.zeros(count, jnp.int32)
    return probes.draw(Clock(), op, like, seed, first, distribution)


@distributions
def test_a_row_depends_on_its_number_alone(distribution):
    rows = np.asarray(_draw(LONG, 5, 3, 10, distribution))
    for first, count in ((10, 1), (14, 1), (12, 5)):
        again = np.asarray(_draw(LONG, count, 3, first, distribution))
        common = min(count, 15 - first)
        np.testing.assert_array_equal(rows[first - 10 :][:common], again[:common])
    assert not np.any(np.all(rows == np.asarray(_draw(LONG, 5, 4, 10, distribution)), axis=1))
    assert len({row.tobytes() for row in rows}) == 5


@distributions
def test_bits_do_not_depend_on_the_64_bit_mode(distribution):
    narrow = np.asarray(_draw(100, 2, 3, 0, distribution))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(narrow, np.asarray(_draw(100, 2, 3, 0, distribution)))
        assert _draw(100, 2, 3, 0, distribution, jnp.float64).dtype == np.float64


@distributions
def test_covariance_is_the_identity(distribution):
    """Entries, products of entries of one row, and of two rows: means within 5 deviations."""
    n, count = 48, 4000
    z = np.asarray(_draw(n, count, 8, 0, distribution), np.float64)
    assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(count)
    covariance = z.T @ z / count
    assert np.abs(covariance - np.eye(n)).max() < 5 * np.sqrt(2 / count)
    rows = z @ z.T / n
    np.fill_diagonal(rows, 0)
    assert np.abs(rows).max() < 7 / np.sqrt(n)


def test_marginal_distributions():
    signs = np.asarray(_draw(LONG, 2, 1, 0, "rademacher"))
    assert set(np.unique(signs)) == {-1, 1}
    # Every bit of the words is used, and none is worn: 32 columns of signs, each balanced.
    columns = signs[:, : CHUNK // 32 * 32].reshape(-1, 32)
    assert np.abs(columns.mean(axis=0)).max() < 5 / np.sqrt(len(columns))
    normal = np.sort(np.asarray(_draw(LONG, 1, 1, 0, "gaussian"), np.float64)[0])
    from scipy.stats import kstest

    assert kstest(normal, "norm").pvalue > 1e-3


def test_sphere_has_the_radius_and_the_direction_of_the_gaussian():
    sphere = np.asarray(_draw(LONG, 3, 5, 0, "sphere"), np.float64)
    gaussian = np.asarray(_draw(LONG, 3, 5, 0, "gaussian"), np.float64)
    np.testing.assert_allclose(np.linalg.norm(sphere, axis=1), np.sqrt(LONG), rtol=EPS)
    unit = gaussian / np.linalg.norm(gaussian, axis=1)[:, None] * np.sqrt(LONG)
    np.testing.assert_allclose(sphere, unit, rtol=4 * EPS)


@distributions
def test_columns_are_pieces_of_the_rows(distribution):
    whole = np.asarray(_draw(LONG, 3, 9, 4, distribution))
    rows = jnp.arange(4, 7, dtype=jnp.uint32)
    piece = probes.columns(
        jnp.uint32(9), rows, jnp.int32(CHUNK), LONG - CHUNK, np.float32, distribution
    )
    expected = whole[:, CHUNK:]
    if distribution == "sphere":
        expected = np.asarray(_draw(LONG, 3, 9, 4, "gaussian"))[:, CHUNK:]
    np.testing.assert_array_equal(np.asarray(piece), expected)


@distributions
def test_scratch_does_not_grow_with_n(distribution):
    n, b = 40 * CHUNK, 2
    block = probes._Block(b, n, np.dtype(np.float32))
    program = probes._PROGRAMS[distribution]
    need = program.work_bytes(Clock(), block, np.uint32(0), np.uint32(0))
    # The sphere's rows are scaled once their length is known: on a CPU in a second block.
    blocks = 2 if distribution == "sphere" else 1
    assert need <= blocks * 4 * b * n + 40 * b * CHUNK
