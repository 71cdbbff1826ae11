"""What `converged` and `complete` promise: nothing that could displace a wanted pair is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.krylov.spectra import diagonal, wanted

import curvax as cx
from curvax.krylov.exclusion import Cycle, log_growth


def _missed(result, values, k, which):
    """How far the worst returned value is from the one of its rank, relative to |λ|max."""
    truth = wanted(np.asarray(values, float), k, which)
    found = result.eigenvalues
    if which == "LM":
        truth, found = np.sort(np.abs(truth)), np.sort(np.abs(found))
    return np.abs(found - truth).max() / np.abs(values).max()


CLUSTERS = np.concatenate(
    [[10] * 4, [-9.7] * 2, [8] * 3, [7] * 3, [6] * 3, np.random.default_rng(5).normal(size=105) / 2]
)


@pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
class TestComplete:
    """A settled next in line must not hide what comes behind it."""

    @pytest.mark.parametrize(
        "k, which", [(4, "LM"), (2, "LA"), (5, "LM"), (4, "LA"), (6, "BE"), ((4, 2), "BE")]
    )
    def test_copies_behind_settled_pairs_with_the_smallest_basis(self, k, which):
        op, count = diagonal(CLUSTERS), sum(k) if isinstance(k, tuple) else k
        for seed in range(10):
            result = cx.eigsh(
                op, k, which=which, certify="complete", max_basis=count + 4, seed=seed
            )
            assert result.complete and result.all_converged
            assert _missed(result, CLUSTERS, k, which) < 2e-3

    @pytest.mark.parametrize("block", [2, 3])
    def test_copies_with_blocks(self, block):
        op = diagonal(CLUSTERS)
        for seed in range(5):
            result = cx.eigsh(
                op, 4, certify="complete", block_size=block, max_basis=4 + 4 * block, seed=seed
            )
            assert result.complete and _missed(result, CLUSTERS, 4, "LM") < 2e-3

    def test_a_warm_start_at_the_wrong_pairs(self):
        values = np.concatenate([[1, 0.61, 0.6045, -0.603], np.linspace(-0.3, 0.6, 19996)])
        op, start = diagonal(values), np.eye(3, len(values), dtype=np.float32)[[0, 2]]
        for seed in range(4):
            result = cx.eigsh(op, 2, v0=start, certify="complete", seed=seed)
            assert not result.complete or _missed(result, values, 2, "LM") < 2e-3
            assert result.complete

    @pytest.mark.slow
    @pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
    @pytest.mark.parametrize("basis", ["smallest", None])
    @pytest.mark.parametrize("start", ["cold", "warm"])
    def test_random_clusters(self, which, basis, start):
        """Values of a variation of one's own: clusters of any multiplicity, near copies of sign."""
        for seed in range(20):
            rng = np.random.default_rng(seed)
            centres = np.sort(rng.uniform(4, 10, size=5))[::-1] * rng.choice([-1, 1], size=5)
            values = np.repeat(centres, rng.integers(1, 5, size=5))
            values = np.concatenate([values, rng.normal(size=100 - len(values)) * 0.5])
            k = int(rng.integers(1, 7))
            v0 = (
                np.eye(100, dtype=np.float32)[rng.permutation(100)[:k]] if start == "warm" else None
            )
            result = cx.eigsh(
                diagonal(values), k, which=which, certify="complete", v0=v0, seed=seed,
                max_basis=k + 4 if basis else None,
            )  # fmt: skip
            good = _missed(result, values, k, which) < 3e-3
            assert good or not (result.complete and result.all_converged)
            assert result.complete


@pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_without_a_search_what_shows_is_waited_for(which):
    """Distinct values close to each other, the smallest basis: no converged pair is displaced."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.uniform(3, 9, 8), -rng.uniform(3, 9, 8), rng.normal(size=104)])
        result = cx.eigsh(diagonal(values), 4, which=which, max_basis=8, seed=seed)
        assert not result.all_converged or _missed(result, values, 4, which) < 3e-3


def test_the_growth_is_that_of_the_eigenvector():
    """Of a block Lanczos run in float64 with a restart: what an eigenvector has of each block."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=40))
    start = np.linalg.qr(rng.normal(size=(40, 2)))[0]
    target = 39
    cycles, basis, first = [], np.zeros((40, 0)), 0
    following = start
    for kept in (4, 3):
        while basis.shape[1] < 12:
            basis = np.column_stack([basis, following])
            image = values[:, None] * following
            for _ in range(2):
                image = image - basis @ (basis.T @ image)
            following = np.linalg.qr(image)[0]
        projection = basis.T @ (values[:, None] * basis)
        theta, vectors = np.linalg.eigh((projection + projection.T) / 2)
        coupling = following.T @ (values[:, None] * basis)
        cycles.append(Cycle(theta, coupling @ vectors, vectors[first : first + 2]))
        basis, first = basis @ vectors[:, -kept:], kept
    # c = c_start (K ⋯)⁻¹, of the largest growth over directions of the start.
    product = np.eye(2)
    for cycle in cycles:
        product = (cycle.ends / (values[target] - cycle.values)) @ cycle.begins.T @ product
    np.testing.assert_allclose(following[target] @ product, start[target], rtol=1e-6)
    least = np.linalg.svd(product, compute_uv=False)[-1]
    expected = -np.log(max(least, 1e-3 * np.linalg.norm(product)))
    np.testing.assert_allclose(log_growth(values[target], cycles), expected, rtol=1e-6)
    assert log_growth(0.3, []) == 0


class TestDisjointParameters:
    """A loss that is a sum over models without a common parameter."""

    @staticmethod
    def _ensemble(step, last=39):
        """The largest value of the first half is followed, that of the second overtakes it."""
        rng = np.random.default_rng(0)
        first = np.concatenate([[7 + 0.47 * step / last, 4, 3], 0.3 * rng.normal(size=197)])
        second = np.concatenate([[5 + 5.4 * step / last, 4.5, 2], 0.3 * rng.normal(size=197)])
        return np.concatenate([first, second])

    @staticmethod
    def _in_one_half(result, seed, k):
        """The vectors, moved a little within the half that holds them, and zero in the other."""
        rng = np.random.default_rng(seed)
        rows = np.array(result.eigenvectors, np.float32).reshape(k, 2, 200)
        drift = 0.05 * rng.normal(size=rows.shape) / np.sqrt(200)
        inside = np.linalg.norm(rows, axis=2) == np.linalg.norm(rows, axis=2).max(1)[:, None]
        return ((rows + drift) * inside[:, :, None]).reshape(k, 400).astype(np.float32)

    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("tol", [1e-2, 1e-3])
    def test_warm_solves_see_the_other_half(self, k, tol):
        start = None
        for step in range(0, 40, 3):
            values = self._ensemble(step)
            result = cx.eigsh(diagonal(values), k, which="LA", v0=start, tol=tol, seed=0)
            assert result.all_converged
            # What overtakes by 3 % or three tolerances shows.
            np.testing.assert_allclose(
                result.eigenvalues, np.sort(values)[::-1][:k], rtol=0.03 + tol
            )
            start = self._in_one_half(result, step, k)

    def test_sharpness_along_the_way(self):
        """While the one followed moves, an overtaking is seen at once; else within eight steps."""
        previous, blind = None, 0
        for step in range(40):
            values = self._ensemble(step)
            previous = cx.sharpness(diagonal(values), previous)
            wrong = abs(previous.eigenvalues[0] - values.max()) > 0.03 * values.max()
            assert not (wrong and previous.num_matvecs)
            blind = blind + 1 if previous.num_matvecs == 0 else 0
            assert blind <= 8
        np.testing.assert_allclose(previous.eigenvalues[0], 10.4, rtol=0.02)

    @pytest.mark.parametrize("k", [1, 5])
    def test_a_warm_start_costs_little(self, k):
        """On spectra like networks', moved by 1 %: at most 1.3 times the k + 5 products at least.

        So many a start in an invariant subspace would need to show a closed Krylov space.
        """
        rng, made = np.random.default_rng(1), []
        for values in (
            [13 * 0.8 ** np.arange(20), -3 * 0.8 ** np.arange(10), 0.05 * rng.normal(size=970)],
            [13.4 / np.arange(1, 40) ** 1.2, 0.003 * rng.standard_t(3, size=961)],
            [[20, 15, 12, 9, 7, -8, -5], rng.normal(size=993)],
            [10 / np.arange(1, 1001) ** 1.5],
        ):
            values = np.concatenate(values)
            for seed in range(3):
                start = np.eye(1000)[np.argsort(-np.abs(values))[:k]]
                start = start + 1e-2 * rng.normal(size=start.shape) / np.sqrt(1000)
                warm = cx.eigsh(
                    diagonal(values), k, v0=start, seed=seed, tol=1e-2 if k == 1 else 1e-3
                )
                assert warm.all_converged
                made.append(warm.num_matvecs)
        assert np.mean(made) <= 1.3 * (k + 5)

    def test_an_ensemble_of_networks(self):
        """Two networks, each with a loss of its own; the second is scaled up until it leads."""
        keys = jax.random.split(jax.random.key(0), 4)
        x, y = jax.random.normal(keys[0], (64, 4)), jax.random.normal(keys[1], (64,))

        def one(p):
            return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)

        def loss(params, batch):
            return one(params["a"]) + batch * one(params["b"])

        def net(key):
            a, b = jax.random.split(key)
            return {"w": jax.random.normal(a, (4, 16)), "v": jax.random.normal(b, (16,))}

        params = {"a": net(keys[2]), "b": net(keys[3])}
        op = result = None
        for weight in (0.2, 0.8, 3.0):
            batch = jnp.float32(weight)
            op = op.at(params, batches=batch) if op else cx.hessian(loss, params, batch)
            result = cx.eigsh(op, 1, which="LA", v0=result, seed=0)
            truth = np.linalg.eigvalsh(np.asarray(op.product(jnp.eye(160)), np.float64))[-1]
            np.testing.assert_allclose(result.eigenvalues[0], truth, rtol=1e-2)
