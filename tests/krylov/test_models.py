"""Hessians of real models against dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from tests.krylov.spectra import assert_honest

import curvax as cx

# The 9-parameter network of "Hessian analysis with JAX": its parameters, its data, and the
# eigenvalues of its dense float64 Hessian.
POST_PARAMS = {
    "fc1.weight": [[0.3645523, 0.9664639], [-0.5033512, -0.4280049]],
    "fc1.bias": [-0.0550507, 0.2033689],
    "fc2.weight": [[0.9411813, -0.4964321]],
    "fc2.bias": [0.6310059],
}
POST_EIGENVALUES = [
    76.84074442, 1.34895664, 1.14185824, 0.19189738, 0, 0, 0, -0.61654386, -1.14323805
]  # fmt: skip


def post_loss(params, batch):
    x, y = batch
    hidden = x @ params["fc1.weight"].T + params["fc1.bias"][None]
    output = hidden @ params["fc2.weight"].T + params["fc2.bias"][None]
    return jnp.mean(jnp.sum((output - y[:, None]) ** 2, axis=-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_nine_eigenvalues_of_the_post(dtype):
    with jax.enable_x64(dtype == np.float64):
        params = {name: np.asarray(value, dtype) for name, value in POST_PARAMS.items()}
        batch = (np.asarray([[1, 2], [3, 4]], dtype), np.asarray([5, 6], dtype))
        op = cx.hessian(post_loss, params, batch)
        nine = cx.eigsh(op, 9, tol=0, seed=0)
        six = cx.eigsh(op, 6, seed=0)
    tolerance = 77 * (1e-6 if dtype == np.float32 else 1e-9)
    np.testing.assert_allclose(nine.eigenvalues, POST_EIGENVALUES, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        six.eigenvalues, np.delete(POST_EIGENVALUES, [4, 5, 6]), rtol=0, atol=tolerance
    )


def _classifier_loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    logits = hidden @ params["out"]["w"] + params["out"]["b"][None]
    return jnp.mean(
        jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y[:, None], -1)[:, 0]
    )


@pytest.fixture(scope="module")
def digits():
    """A trained classifier of 2,410 parameters on 500 digits, and its dense float64 Hessian."""
    images, labels = load_digits(return_X_y=True)
    x, y = (images[:500] / 16).astype(np.float32), labels[:500].astype(np.int32)
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"w": rng.normal(size=(64, 32)) / 8, "b": np.zeros(32)},
        "out": {"w": rng.normal(size=(32, 10)) / 6, "b": np.zeros(10)},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    gradient = jax.jit(jax.grad(_classifier_loss))
    for _ in range(200):
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient(params, (x, y)))
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params))
        wide = (jnp.asarray(x, jnp.float64), jnp.asarray(y))

        def column(v):
            gradient = jax.grad(lambda f: _classifier_loss(unravel(f), wide))
            return jax.jvp(gradient, (flat,), (v,))[1]

        eye = jnp.eye(flat.size)
        dense = np.asarray(jax.jit(lambda e: jax.lax.map(column, e, batch_size=64))(eye))
    return params, (x, y), (dense + dense.T) / 2


@pytest.mark.parametrize(
    "k, which",
    [
        (10, "LM"),
        pytest.param(6, "SA", marks=pytest.mark.slow),
        pytest.param((9, 4), "BE", marks=pytest.mark.slow),
    ],
)
def test_digits_classifier(digits, k, which):
    params, batch, dense = digits
    op = cx.hessian(_classifier_loss, params, batch, microbatch_size=180)
    # In the bulk eigenvalues lie closer than the tolerance, so that one may be missed.
    certify = "complete" if which == "SA" else "residuals"
    result = cx.eigsh(op, k, which=which, tol=1e-4, seed=0, certify=certify)
    values = np.linalg.eigvalsh(dense)
    high, low = {"LM": (10, 0), "SA": (0, 6), "BE": (9, 4)}[which]
    expected = np.concatenate([values[::-1][:high], values[:low][::-1]])
    scale = np.abs(values).max()
    assert result.all_converged
    # Within the residual certified, and for the isolated ones far closer (Kato-Temple).
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=0, atol=1e-4 * scale)
    flat = np.asarray(op.space.ravel(result.eigenvectors, batch_axes=1))
    products = flat.astype(np.float64) @ dense
    residuals = np.linalg.norm(products - result.eigenvalues[:, None] * flat, axis=1)
    assert residuals.max() <= 1e-4 * scale
    assert result.eigenvectors["hidden"]["w"].shape == (len(expected), 64, 32)


@pytest.mark.parametrize("rows", [pytest.param(None, marks=pytest.mark.slow), 15])
def test_digits_in_float16(digits, rows):
    """Half of the memory of the basis, and eigenvalues to a millionth of themselves."""
    params, batch, dense = digits
    op = cx.hessian(_classifier_loss, params, batch, microbatch_size=180)
    result = cx.eigsh(op, 9, tol=0, seed=0, basis_dtype="float16", max_basis=rows)
    assert result.all_converged and (result.num_restarts > 0) == (rows is not None)
    np.testing.assert_allclose(result.eigenvalues, np.linalg.eigvalsh(dense)[::-1][:9], rtol=1e-6)


def test_digits_filtered_block(digits):
    params, batch, dense = digits
    op = cx.hessian(_classifier_loss, params, batch, where=cx.match_names("out.*"))
    result = cx.eigsh(op, 5, which="LA", tol=1e-5, seed=0)
    block = dense[32 + 2048 :, 32 + 2048 :]
    expected = np.linalg.eigvalsh(block)[::-1][:5]
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-5)
    assert result.eigenvectors["hidden"] == {"w": None, "b": None}


def test_scipy_finds_the_same_through_to_scipy(digits):
    """Our operator in SciPy's solver, whose values are checked against the dense ones."""
    from scipy.sparse.linalg import eigsh as scipy_eigsh

    params, batch, dense = digits
    op = cx.hessian(_classifier_loss, params, batch)
    values = scipy_eigsh(op.to_scipy(), k=3, which="LA", return_eigenvectors=False, tol=1e-6)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense)[-3:], rtol=1e-5)


def test_dense_truth_of_the_honest_check(digits):
    """`assert_honest` fails on a result whose vectors are not those of its values."""
    import dataclasses

    params, batch, dense = digits
    op = cx.from_matvec(lambda v: jnp.asarray(dense, jnp.float32) @ v, dense.shape[0])
    result = cx.eigsh(op, 3, seed=0, max_basis=40)
    assert_honest(dense, result, float(np.finfo(np.float32).eps))
    swapped = dataclasses.replace(result, eigenvectors=result.eigenvectors[::-1])
    with pytest.raises(AssertionError):
        assert_honest(dense, swapped, float(np.finfo(np.float32).eps))
