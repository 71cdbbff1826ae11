"""Calls the public functions with every annotation of the package checked, shapes included.

Run by itself, since the checks come in when the package is imported; see `test_types.py`. With
`--all`, every method; else the first of each list.
"""

import importlib
import pkgutil
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from beartype import beartype, roar
from jaxtyping import TypeCheckError, install_import_hook

ALL = "--all" in sys.argv


def some(*values):
    return values if ALL else values[:1]


def checked(function):
    """A function whose arguments and results are checked."""
    module, name = function.__module__, function.__name__
    # JAX makes operators anew with placeholders in place of arrays.
    rebuilt = module.startswith("curvax.operators") and name in ("__init__", "check_single_arg")
    # beartype does not take a member of an archive for the file that it is.
    if rebuilt or module == "curvax.archives":
        return function
    try:
        return beartype(function)
    except roar.BeartypeDecorHintPep673Exception:  # which says `Self`
        return function


PACKAGES = ("krylov", "estimators", "operators", "ops", "results", "losses", "nn", "device")


def import_checked():
    with install_import_hook("curvax", f"{__name__}.checked"):
        import curvax

        for package in PACKAGES:
            path = importlib.import_module(f"curvax.{package}").__path__
            for module in pkgutil.walk_packages(path, f"curvax.{package}."):
                importlib.import_module(module.name)
        importlib.import_module("curvax.compat")
    return curvax


def problem():
    """Softmax regression: parameters, forward pass, loss and batches."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (5, 3)), "b": jax.random.normal(keys[1], (3,))}
    x, labels = jax.random.normal(keys[2], (8, 5)), jax.random.randint(keys[3], (8,), 0, 3)

    def forward(params, batch):
        return batch[0] @ params["w"] + params["b"]

    return params, forward, [(x, labels), (x[::-1] + 1, labels)]


def call_operators(cx):
    """Operators of each kind, and what they do with vectors."""
    params, forward, batches = problem()
    loss = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])
    model = cx.Model(params, forward, loss)
    flat = {}
    known = {
        "hessian": (hessian := cx.hessian(model, batches, microbatch_size=4)),
        "ggn": cx.ggn(forward, loss, params, batches, linearize=False),
        "fisher": cx.fisher(model, batches, kind="mc", num_samples=2, seed=0),
    }
    for name, op in known.items():
        flat[name] = np.asarray(op.ravel(op @ params))
    np.testing.assert_allclose(flat["hessian"], flat["ggn"], rtol=1e-4, atol=1e-6)
    block = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    both = np.stack([flat["ggn"], -flat["ggn"]])
    np.testing.assert_allclose(hessian.ravel(hessian @ block), both, rtol=1e-4, atol=1e-6)
    return hessian


def call_operators_further(cx, hessian):
    """What operators are made of others, and the kinds that are seldom wanted."""
    params, forward, batches = problem()
    loss = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])
    cx.fisher(forward, loss, params, batches, kind="exact")
    differences = cx.hessian(cx.Model(params, forward, loss), batches, method="finite_difference")
    np.testing.assert_allclose(
        differences.ravel(differences @ params), hessian.ravel(hessian @ params), 1e-2, 1e-3
    )
    moved = hessian.at(jax.tree.map(lambda leaf: 2 * leaf, params))
    rest = (moved + hessian).congruence(params).project_off(params)
    left = rest.ravel(rest @ params)
    assert jnp.abs(left).max() < 1e-4
    blocks = hessian.blocks(1)
    assert cx.trace(blocks, num_matvecs=20).keys() == cx.diagonal(blocks, num_matvecs=20).keys()


def call_solvers(cx, op):
    """Every solver and estimator, on operators and on their diagonal blocks."""
    dense = np.asarray(jax.vmap(op.ravel)(op @ op.unravel(np.eye(op.shape[0], dtype=np.float32))))
    matrix = ((dense + dense.T) / 2).astype(np.float32)
    largest = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1]
    for given in (
        op,
        matrix,
        scipy.sparse.csr_array(matrix),
        cx.from_matvec(lambda v: jnp.asarray(matrix) @ v, jnp.zeros(len(matrix))),
    ):
        found = cx.eigsh(given, 2, callback=lambda progress: None)
        np.testing.assert_allclose(found.eigenvalues, largest[:2], rtol=1e-3)
    for certify in some("sampled", "complete"):
        cx.eigsh(op, (1, 1), which="BE", v0=found.eigenvectors[0], certify=certify, max_basis=12)
    assert cx.plan(op, 2).fits
    pairs = cx.eigsh(op, 2)
    top = cx.sharpness(op, cx.sharpness(op))
    np.testing.assert_allclose(top.eigenvalues, largest[:1], rtol=2e-2)
    for count in some(1, 2):
        power = cx.power_iteration(op, count, max_matvecs=500)
        np.testing.assert_allclose(power.eigenvalues[:1], largest[:1], rtol=1e-2)
    for whole in some(False, True):
        steps = cx.lanczos_tridiagonal(op, 6, reorthogonalize=whole, return_basis=True, seed=0)
        assert [len(part) for part in steps.ritz()] == [6, 6, 6]
    for method in some("cg", "minres"):
        cx.solve(op, op.unravel(np.ones(op.shape[0], np.float32)), damping=1.0, method=method)
    traced = [
        cx.trace(op, num_matvecs=12, method=method, seed=0)
        for method in some("xtrace", "hutchinson", "hutch++", "xnystrace")
    ]
    assert all(abs(part.estimate - np.trace(matrix)) < 1 for part in traced)
    for method in some("exact", "hutchinson", "xdiag"):
        cx.diagonal(op, num_matvecs=20, method=method)
    density = cx.spectral_density(op, num_runs=3, num_steps=8, deflate=pairs, seed=0)
    assert density.cdf(np.asarray([-100.0, 100.0])).tolist() == [0, 1]
    density.quantile(0.5), density.quantile_interval([0.2, 0.9]), density.evaluate(0.0)
    cx.log_det(op, damping=1.0, num_runs=3, num_steps=8, seed=0)
    split = cx.eigsh(op.blocks(1), 2)
    with tempfile.TemporaryDirectory() as folder:
        for result in (split, *traced, pairs, steps, density):
            path = f"{folder}/result"
            result.save(path)
            assert type(cx.load(path)) is type(result)
            assert str(result)


def call_losses(losses):
    """The losses as functions, with a weight and without."""
    keys = jax.random.split(jax.random.key(1), 2)
    hidden, head = jax.random.normal(keys[0], (2, 4, 5)), jax.random.normal(keys[1], (7, 5))
    labels = jnp.arange(8).reshape(2, 4) % 7
    plain = losses.softmax_cross_entropy(hidden @ head.T, labels)
    fused, weight = losses.linear_cross_entropy(
        hidden, head, labels, bias=jnp.zeros(7), chunk=2, return_weight=True
    )
    np.testing.assert_allclose(plain, fused, rtol=1e-5)
    assert weight == 8
    assert losses.mse(hidden, np.asarray(hidden) + 1) == 1
    linear = losses.LinearCrossEntropy(lambda batch: labels)
    for kind in some("exact", "empirical"):
        linear.fisher_product((hidden, head), None, (hidden, head), kind, None)
    linear.hessian_product((hidden, head), None, (hidden, head))


def call_attention(attention):
    """Every kind of argument, and each of the derivatives."""
    query = jax.random.normal(jax.random.key(2), (1, 6, 4, 3))
    key, bias = query[:, :5, :2], jnp.zeros((4, 1, 5))
    ids = np.zeros((1, 6), int)
    options = {"local_window_size": (4, 1), "is_causal": True, "softcap": 2.0, "scale": 0.5}
    options |= {"query_segment_ids": ids, "key_value_segment_ids": ids[:, :5]}
    options |= {"query_seq_lengths": np.array([5]), "mask": np.ones((6, 5), bool)}

    def total(query, bias):
        return jnp.sum(attention(query, key, key, bias, **options) ** 2)

    for f in (
        lambda q: total(q, bias),
        lambda q: attention(q[0], key[0], key[0], impl="reference").sum(),
    ):
        product = jax.jvp(jax.grad(f), (query,), (query,))[1]
        assert product.shape == query.shape


def refused(call):
    try:
        call()
    except TypeCheckError:
        return True
    return False


def call_wrongly(cx):
    """What no annotation allows, so that the checks themselves are seen."""
    from curvax.device import programs
    from curvax.program import Clock
    from curvax.results import LanczosTridiagonal

    logits, one = jnp.zeros((4, 3)), np.ones(3)
    assert refused(lambda: cx.losses.softmax_cross_entropy(logits, jnp.zeros(5, int)))
    assert refused(lambda: cx.losses.mse(logits, logits.T))
    assert refused(lambda: cx.nn.dot_product_attention(logits[None], logits[None].mT, logits))
    assert refused(lambda: cx.eigsh(np.eye(3, dtype=np.float32), 1.5))
    assert refused(lambda: LanczosTridiagonal(one, one, 0.0, None, 3, 0, {}))
    assert refused(lambda: programs.squared_distance.fun(jnp.zeros((1, 3)), jnp.zeros((1, 4))))
    assert Clock().parts().keys() == {"compile", "total"}


def main():
    warnings.simplefilter("ignore")
    cx = import_checked()
    op = call_operators(cx)
    call_solvers(cx, op)
    call_losses(cx.losses)
    call_attention(cx.nn.dot_product_attention)
    if ALL:
        call_operators_further(cx, op)
    call_wrongly(cx)


if __name__ == "__main__":
    main()
