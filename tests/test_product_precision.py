"""curvax's own products of matrices are in full precision, whatever JAX's setting for them is."""

import functools
import gc
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import dot_general_p

import curvax as cx
from curvax import program as compiled
from curvax.krylov import lanczos

N = 300
VALUES = np.append([10.0, 9.0, -8.0], np.linspace(2, 1, N - 3))
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
# A product that follows the first is in float32 at most, even of float64; on a CPU, JAX refuses one
# that follows the second.
NARROWING, REFUSED = "BF16_BF16_F32_X3", "TF32_TF32_F32"
OTHERS = ["bfloat16", "tensorfloat32", REFUSED]


def elementwise(v):
    """A matrix without a product of the user's."""
    return jnp.asarray(VALUES, v.dtype) * v


def forward(params, x):
    return params["w"][None, :] * x


def everything():
    """Each public computation once, on operators whose products are curvax's or elementwise."""
    op, v = cx.from_matvec(elementwise, N), jnp.ones(N, jnp.float32)
    pairs = cx.eigsh(op, 2, seed=0, max_basis=12, block_size=2, certify="complete")
    cx.eigsh(op, 2, v0=pairs, seed=0, max_basis=20, certify="sampled", basis_dtype="float16")
    cx.eigsh(np.diag(VALUES[:9]).astype(np.float32), 2, seed=0)
    cx.sharpness(op, pairs)
    op.project_off(pairs) @ v
    square = op + 20 * cx.identity(op)
    for distribution in ("rademacher", "gaussian", "sphere"):
        cx.trace(op, method="xtrace", num_matvecs=12, distribution=distribution, seed=0)
    cx.trace(square, method="xnystrace", num_matvecs=12, seed=0)
    cx.trace(op, method="hutch++", num_matvecs=12, seed=0)
    cx.trace(op, method="hutchinson", num_matvecs=12, seed=0, deflate=pairs)
    for method in ("hutchinson", "xdiag", "exact"):
        cx.diagonal(op, method=method, num_matvecs=20, seed=0)
    cx.spectral_density(op, num_runs=2, num_steps=9, deflate=pairs, seed=0)
    cx.log_det(square, num_runs=2, num_steps=9, seed=0)
    cx.lanczos_tridiagonal(op, 5, seed=0, reorthogonalize=True, return_basis=True)
    cx.power_iteration(op, k=2, seed=0)
    cx.solve(square, v, tol=1e-3)
    params, x = {"w": jnp.linspace(1, 2, 7), "v": jnp.ones(3)}, jnp.ones((4, 7))
    loss = cx.losses.MeanSquaredError(lambda batch: 0 * batch)
    for kind in ("empirical", "mc"):
        cx.fisher(forward, loss, params, x, kind=kind, microbatch_size=1) @ params
    both = cx.hessian(lambda p, b: jnp.sum(p["w"] ** 4) + jnp.sum(p["v"] ** 2), params, x)
    cx.trace(both.blocks(1), num_matvecs=5, method="hutchinson", seed=0)
    with pytest.MonkeyPatch.context() as patch:  # of a device: several steps in one program
        patch.setattr(lanczos, "on_device", lambda op: True)
        patch.setattr(lanczos, "_SHORT", 1e9)
        cx.eigsh(op, 2, seed=0, max_basis=12)


def all_programs():
    for package in (cx.krylov, cx.estimators):
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{info.name}")
    return {id(x): x for x in gc.get_objects() if isinstance(x, compiled.Program)}


@pytest.fixture(scope="module")
def recorded():
    """Of `everything()`: the programs that ran with their arguments, and all products traced."""
    programs, products = {}, []
    compile_program, bind = compiled.Program._ready, dot_general_p.bind

    def record(self, clock, args):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        key = tuple((x.shape, x.dtype) for x in jax.tree.leaves(shapes))
        programs.setdefault((id(self), key), (self, shapes))
        return compile_program(self, clock, args)

    def traced(*args, **params):
        products.append(params["precision"])
        return bind(*args, **params)

    quick = {**compiled._NARROW, "xla_backend_optimization_level": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURVAX_IMPL", "reference")  # kernels of the CPU would hide products
        patch.setattr(compiled, "compiler_options", lambda *args: quick)
        patch.setattr(compiled.Program, "_ready", record)
        patch.setattr(dot_general_p, "bind", traced)
        with jax.default_matmul_precision(REFUSED):
            everything()
        compiled._cache.clear()
    return list(programs.values()), products


def lowered(program, args, platform):
    fresh = functools.wraps(program.fun)(lambda *args: program.fun(*args))
    with program._mode():
        return jax.jit(fresh).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_every_program_ran_and_traced_full_products(recorded):
    programs, products = recorded
    known, ran = all_programs(), {id(program) for program, _ in programs}
    assert ran == set(known), [p.fun for i, p in known.items() if i not in ran]
    assert len(products) > 20 and set(products) == {HIGHEST}


@pytest.mark.parametrize(
    "preset,platform",
    [
        (NARROWING, "cuda"),
        pytest.param(NARROWING, "cpu", marks=pytest.mark.slow),
        *(pytest.param(preset, "cuda", marks=pytest.mark.slow) for preset in OTHERS),
    ],
)
def test_no_compiled_product_follows_the_setting(preset, platform, recorded, monkeypatch):
    monkeypatch.setenv("CURVAX_IMPL", "reference")
    count = 0
    with jax.default_matmul_precision(preset):
        for program, args in recorded[0]:
            for line in lowered(program, args, platform).splitlines():
                assert "stablehlo.convolution" not in line
                if "stablehlo.dot_general" in line:
                    assert "precision = [HIGHEST, HIGHEST]" in line, (program.fun, line)
                    assert "algorithm" not in line, (program.fun, line)
                    count += 1
    assert count > 20


@pytest.mark.parametrize("preset", [NARROWING, pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_certificates_are_the_same_bits_under_a_setting(preset):
    """With orthogonality as it is in float64, of which a sum in float32 would show 1e-7 at most."""
    op = cx.from_matvec(elementwise, N)
    plain = cx.eigsh(op, 3, seed=0, max_basis=30)
    with jax.default_matmul_precision(preset):
        result = cx.eigsh(op, 3, seed=0, max_basis=30)
    x = np.asarray(result.eigenvectors, np.float64)
    truth = np.abs(x @ x.T - np.eye(3)).max()
    np.testing.assert_allclose(result.orthogonality, truth, rtol=1e-6)
    rest = np.linalg.norm(VALUES.astype(np.float32) * x - result.eigenvalues[:, None] * x, axis=1)
    np.testing.assert_allclose(result.residuals, rest, atol=4e-7 * 10)
    for name in ("eigenvalues", "residuals", "orthogonality", "noise"):
        assert np.array_equal(getattr(result, name), getattr(plain, name)), name
