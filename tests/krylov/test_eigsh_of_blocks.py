"""`eigsh` over the blocks of an operator, against dense eigenvalues of the slices."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax import program as compiled
from curvax.results import BlockResults

LIKE = {
    "embed": np.zeros(3, np.float32),
    "layers": [{"b": np.zeros(40, np.float32), "w": np.zeros((40, 9), np.float32)}] * 3,
}
SIZES = {"embed": 3, "layers.0": 400, "layers.1": 400, "layers.2": 400}
N = 1203


def _matrix():
    """Decaying, of both signs, in a random basis; layer i is the larger the later."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    a = (q * (0.9 ** np.arange(N) * rng.choice([-1, 1], N))) @ q.T
    scale = np.repeat([1, 1, 2, 4], list(SIZES.values()))
    return (scale[:, None] * a * scale).astype(np.float32)


MATRIX = _matrix()
PLACES = {
    name: slice(end - SIZES[name], end)
    for name, end in zip(SIZES, np.cumsum(list(SIZES.values())), strict=True)
}


def _operator(matrix=MATRIX):
    _, unravel = ravel_pytree(LIKE)
    m = jnp.asarray(matrix)
    return cx.from_matvec(
        lambda v: unravel(jnp.dot(m, ravel_pytree(v)[0], precision="highest")), LIKE
    )


def _truth(name, k):
    values = np.linalg.eigvalsh(MATRIX[PLACES[name], PLACES[name]].astype(np.float64))
    return values[np.argsort(-np.abs(values))[:k]]


def test_every_block_by_name():
    results = cx.eigsh(_operator().blocks(2), 4, tol=1e-5, seed=0)
    assert isinstance(results, BlockResults) and dict(results.sizes) == SIZES
    for name, result in results.items():
        # Of a block that has fewer, all.
        k = min(4, SIZES[name])
        expected = _truth(name, k)
        assert result.all_converged and len(result.eigenvalues) == k
        error = np.abs(np.sort(result.eigenvalues) - np.sort(expected)).max()
        assert error <= 1e-4 * np.abs(expected).max()
        block = MATRIX[PLACES[name], PLACES[name]].astype(np.float64)
        vectors = np.stack(
            [ravel_pytree({k: x[i] for k, x in result.eigenvectors.items()})[0] for i in range(k)]
        ).astype(np.float64)
        residuals = np.linalg.norm(
            vectors @ block - np.asarray(result.eigenvalues)[:, None] * vectors, axis=1
        )
        assert residuals.max() <= 1e-4 * np.abs(expected).max()


def test_every_shape_compiles_once(monkeypatch):
    """Though blocks of two shapes take turns, and only the programs of one are kept."""
    monkeypatch.setattr(compiled, "_cache", collections.OrderedDict())
    monkeypatch.setattr(compiled, "_CACHED", 12)
    results = cx.eigsh(_operator().blocks(3), 3, max_basis=30, seed=0)
    assert list(results)[:3] == ["embed", "layers.0.b", "layers.0.w"]
    compiling = [name for name, result in results.items() if result.seconds["compile"] > 0]
    assert compiling == ["embed", "layers.0.b", "layers.0.w"]


@pytest.mark.parametrize(
    "k, options",
    [(np.int64(5), {}), ((3, 2), {"which": "BE"}), (4, {"block_size": 4})],
)
def test_what_small_blocks_have_less_of(k, options):
    results = cx.eigsh(_operator().blocks(2), k, seed=0, **options)
    expected = np.sort(_truth("embed", 3))[::-1]
    np.testing.assert_allclose(results["embed"].eigenvalues, expected, rtol=1e-4, atol=1e-6)
    assert len(results["layers.1"].eigenvalues) == (5 if k != 4 else 4)


def test_a_warm_start_from_an_interrupted_call():
    blocks = _operator().blocks(2)
    first = cx.eigsh(blocks, 2, seed=0)
    part = BlockResults({"layers.0": first["layers.0"]}, {"layers.0": 400})
    again = cx.eigsh(blocks, 2, v0=part, seed=0)
    assert again.all_converged and list(again) == list(blocks)


def test_an_error_names_its_block():
    def product(v):
        return {**v, "layers": [v["layers"][0], jax.tree.map(lambda x: x / 0, v["layers"][1])]}

    like = {"embed": jnp.ones(3), "layers": [{"w": jnp.ones(70)}] * 2}
    with pytest.raises(FloatingPointError) as caught:
        cx.eigsh(cx.from_matvec(product, like).blocks(2), 1, seed=0)
    assert "in the block 'layers.1'" in caught.value.__notes__


def test_warm_start():
    op = _operator()
    first = cx.eigsh(op.blocks(2), 3, seed=0)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(N, N)) * 1e-5 / np.sqrt(N)
    moved = _operator(MATRIX + (noise + noise.T).astype(np.float32)).blocks(2)
    cold, warm = cx.eigsh(moved, 3, seed=0), cx.eigsh(moved, 3, v0=first, seed=0)
    for name in ("layers.0", "layers.1", "layers.2"):
        assert warm[name].num_matvecs < cold[name].num_matvecs
        np.testing.assert_allclose(warm[name].eigenvalues, cold[name].eigenvalues, rtol=1e-4)


def test_bad_start():
    blocks = _operator().blocks(2)
    with pytest.raises(
        TypeError, match="v0, for the blocks .* must be the BlockResults .* ndarray"
    ):
        cx.eigsh(blocks, 2, v0=np.ones(N))
