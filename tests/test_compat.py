"""The classes of the post "Hessian analysis with JAX", on its own examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import compat
from curvax.compat import EigshArgs, HessianAnalyzer, generate_MSE_loss_func

# The post's trained parameters, as it prints them, and the eigenvalues that it finds.
PARAMS = {
    "fc1.weight": [[0.3645523, 0.9664639], [-0.5033512, -0.4280049]],
    "fc1.bias": [-0.0550507, 0.2033689],
    "fc2.weight": [[0.9411813, -0.4964321]],
    "fc2.bias": [0.6310059],
}
POSTED = [-1.1432382, -0.61654264, 0.1918977, 1.1418587, 1.3489572, 76.840744]
# All nine, in float64, of the dense Hessian.
EXACT = [-1.14323805, -0.61654386, 0, 0, 0, 0.19189738, 1.14185824, 1.34895664, 76.84074442]

X = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
Y = np.array([[5.0], [6.0]], np.float32)


@pytest.fixture(autouse=True)
def default_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def forward(params, x):
    w1, b1 = jnp.array(params["fc1.weight"]), jnp.array(params["fc1.bias"])
    w2, b2 = jnp.array(params["fc2.weight"]), jnp.array(params["fc2.bias"])
    return jnp.dot(w2, jnp.dot(w1, x) + b1) + b2


def analyzer(dtype=jnp.float32):
    loss = generate_MSE_loss_func(PARAMS, X, Y, forward)
    return HessianAnalyzer(PARAMS, X, Y, forward, loss, dtype=dtype)


def test_the_posts_eigenvalues():
    ha = analyzer()
    values, vectors = ha.get_spectrum(EigshArgs(k=6))
    assert values.dtype == np.float32 and vectors.shape == (9, 6)
    np.testing.assert_allclose(values, POSTED, rtol=1e-5)
    np.testing.assert_allclose(values, [e for e in EXACT if e], rtol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(6), atol=1e-5)
    assert float(ha.loss(ha.params_flat)) == pytest.approx(1.6968628590, rel=1e-6)
    dense = np.asarray(jax.hessian(ha.loss)(ha.params_flat), np.float64)
    assert np.abs(dense @ vectors - vectors * values).max() <= 1e-3 * values[-1]


@pytest.mark.parametrize(
    "options,positions",
    [
        ({"which": "LM", "k": 2}, [7, 8]),
        ({"which": "LA", "k": 3}, [6, 7, 8]),
        ({"which": "SA", "k": 2}, [0, 1]),
        ({"which": "BE", "k": 3}, [0, 7, 8]),
        ({"which": "SM", "k": 4}, [2, 3, 4, 5]),
        ({"sigma": 0.0, "k": 4}, [2, 3, 4, 5]),
        ({"sigma": 1.2, "k": 2}, [6, 7]),
        ({"sigma": -0.7, "k": 1}, [1]),
        ({"sigma": 1.2, "which": "LA", "k": 2}, [7, 8]),
        ({"sigma": 1.2, "which": "SA", "k": 2}, [5, 6]),
        ({"sigma": 1.2, "which": "BE", "k": 2}, [6, 7]),
        ({"sigma": 1.2, "which": "SM", "k": 2}, [0, 8]),
        ({"sigma": 0.5, "k": 9}, range(9)),
    ],
    ids=str,
)
def test_which_eigenvalues(options, positions):
    with jax.enable_x64(True):
        values, vectors = analyzer(jnp.float64).get_spectrum(EigshArgs(**options, tol=1e-10))
    wanted = np.array(EXACT)[list(positions)]
    np.testing.assert_allclose(values, wanted, atol=2e-6)
    assert vectors.shape == (9, len(wanted)) and vectors.dtype == np.float64


def test_values_alone_and_a_starting_vector():
    values, vectors = analyzer().get_spectrum(
        EigshArgs(k=2, v0=np.ones(9), return_eigenvectors=False)
    )
    assert vectors is None
    np.testing.assert_allclose(values, EXACT[-2:], rtol=1e-5)
    assert analyzer().get_spectrum(EigshArgs(k=2, sigma=0.0, return_eigenvectors=False))[1] is None


def test_a_residual_of_zero_has_derivatives():
    """The post's squared norm gives NaN there."""
    params = {"w": [[1.0, 0.0]]}
    loss = generate_MSE_loss_func(params, X, X[:, :1], lambda p, x: jnp.array(p["w"]) @ x)
    values, _ = HessianAnalyzer(params, X, Y, None, loss).get_spectrum(EigshArgs(k=2))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(X.T @ X), rtol=1e-5)


def test_targets_of_a_lower_rank_are_each_samples_own():
    column = generate_MSE_loss_func(PARAMS, X, Y, forward)
    flat = generate_MSE_loss_func(PARAMS, X, Y[:, 0], forward)
    at = analyzer().params_flat
    assert float(column(at)) == float(flat(at))


class TestBadInput:
    def test_too_many_parameters_to_factor(self, monkeypatch):
        monkeypatch.setattr(compat, "MAX_FACTOR", 8)
        for options in ({"sigma": 0.3}, {"which": "SM"}):
            with pytest.raises(ValueError, match=r"9 parameters .*spectral_density"):
                analyzer().get_spectrum(EigshArgs(k=2, **options))

    def test_arguments(self):
        for k in (0, 10, True, 2.0):
            with pytest.raises(ValueError, match="k must be an integer from 1 to 9"):
                analyzer().get_spectrum(EigshArgs(k=k, sigma=0.0))
        with pytest.raises(ValueError, match="which must be one of LM, SM"):
            analyzer().get_spectrum(EigshArgs(k=1, sigma=0.0, which="XX"))
        with pytest.raises(ValueError, match="sigma must be a finite number"):
            analyzer().get_spectrum(EigshArgs(k=1, sigma=float("nan")))
        with pytest.raises(ValueError, match="jax_enable_x64"):
            analyzer(jnp.float64)
        with pytest.raises(ValueError, match="one length, got 2 and 1"):
            generate_MSE_loss_func(PARAMS, X, Y[:1], forward)


def test_compat_is_public():
    assert cx.compat is compat
