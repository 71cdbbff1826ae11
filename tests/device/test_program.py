"""Programs are compiled again where what they depend on has changed, and only there."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import program as compiled

N = 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Reads(cx.Operator):
    """A multiple of the identity that reads a setting where it is traced."""

    data: jax.Array
    read: object = dataclasses.field(metadata={"static": True})
    space: cx.VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block):
        return block * self.read() + 0 * self.data


def reading(read):
    return Reads(jnp.zeros(()), read, cx.VectorSpace.of(jnp.zeros(N), jnp.float32))


def drawn():
    """Another number under another generator."""
    return 1 + jax.random.uniform(jax.random.key(3))


def of_setting(name, factors):
    return lambda: factors[getattr(jax.config, name)]


# What opens a setting, and what reads it: 1 or 2, or a random number.
SETTINGS = {
    "generator": (lambda: jax.default_prng_impl("rbg"), drawn),
    "precision": (
        lambda: jax.default_matmul_precision("highest"),
        of_setting("jax_default_matmul_precision", {None: 1.0, "highest": 2.0}),
    ),
    "64 bits": (
        lambda: jax.enable_x64(True),
        of_setting("jax_enable_x64", {False: 1.0, True: 2.0}),
    ),
    "device": (
        lambda: jax.default_device(jax.devices("cpu")[0]),
        lambda: 1.0 if jax.config.jax_default_device is None else 2.0,
    ),
    "promotion": (
        lambda: jax.numpy_dtype_promotion("standard"),
        of_setting("jax_numpy_dtype_promotion", {"strict": 1.0, "standard": 2.0}),
    ),
}
ENTRIES = {
    "product": lambda op: (op @ jnp.ones(N))[0],
    "eigsh": lambda op: cx.eigsh(op, 1, seed=0).eigenvalues[0],
    "trace": lambda op: cx.trace(op, num_matvecs=4, method="hutchinson", seed=0).estimate / N,
    "diagonal": lambda op: cx.diagonal(op, seed=0).estimate[0],
    "power": lambda op: cx.power_iteration(op, seed=0).eigenvalues[0],
    "solve": lambda op: 1 / cx.solve(op, jnp.ones(N)).x[0],
}


CASES = [(setting, entry) for setting in SETTINGS for entry in ("product", "eigsh")]
CASES += [("generator", entry) for entry in ENTRIES if entry not in ("product", "eigsh")]


@pytest.mark.parametrize("setting,entry", CASES)
def test_results_follow_the_setting_whatever_ran_before(setting, entry):
    enter, read = SETTINGS[setting]
    op, run = reading(read), ENTRIES[entry]
    for _ in range(2):
        before = float(read())
        assert abs(float(run(op)) / before - 1) <= 1e-5
        with enter():
            after = float(read())
            assert abs(after - before) > 1e-3
            assert abs(float(run(op)) / after - 1) <= 1e-5


def test_results_follow_the_choice_of_kernels(monkeypatch):
    op = reading(lambda: 2.0 if os.environ.get("CURVAX_IMPL") else 1.0)
    entries = [ENTRIES[name] for name in ("product", "eigsh")]
    assert np.allclose([run(op) for run in entries], 1)
    monkeypatch.setenv("CURVAX_IMPL", "reference")
    assert np.allclose([run(op) for run in entries], 2)


def spectrum():
    return cx.from_matvec(lambda v: v * jnp.linspace(1.0, 4.0, 300), 300)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


SOLVES = {
    "eigsh": lambda: cx.eigsh(spectrum(), 2, seed=3, max_matvecs=30).residuals,
    "padded start": lambda: (
        cx.eigsh(spectrum(), 2, v0=jnp.ones(300), block_size=2, seed=3, max_matvecs=30).residuals
    ),
    "differences": lambda: (
        cx.hessian(
            lambda p, x: jnp.mean(jnp.tanh(x @ p) ** 2),
            jnp.linspace(-1, 1, 5),
            jnp.eye(5),
            method="finite_difference",
        ).relative_error
    ),
}


@pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
@pytest.mark.parametrize("solve", SOLVES)
def test_a_seed_gives_the_same_bits_under_any_default_generator(solve, monkeypatch):
    first = bits(SOLVES[solve]())
    monkeypatch.setattr(compiled, "_cache", type(compiled._cache)())
    with jax.default_prng_impl("unsafe_rbg"):
        assert bits(SOLVES[solve]()) == first


def test_nothing_is_compiled_twice_under_the_same_settings():
    op = reading(lambda: 3.0)
    for _ in range(2):
        clock = compiled.Clock()
        with jax.default_prng_impl("rbg"):
            cx.eigsh(op, 1, seed=0)
        cx.eigsh(op, 1, seed=0)
        kept = list(compiled._cache)
    assert kept == list(compiled._cache)
    programs = compiled.Program(lambda x: 2 * x), compiled.Program(lambda x: 3 * x)
    x = jnp.ones(5)
    for program in programs:
        program(clock, x)
        first = clock.seconds["compile"]
        assert first > 0
        # The shapes alone, and arrays that are bound to no device, ask for the same program.
        program.work_bytes(clock, jax.ShapeDtypeStruct((5,), jnp.float32))
        program(clock, x + 1)
        assert clock.seconds["compile"] == first


def test_a_donated_argument_is_gone():
    program = compiled.Program(lambda x: x + 1, donate=(0,))
    x = jnp.ones(50)
    assert np.array_equal(program(compiled.Clock(), x), np.full(50, 2.0))
    assert x.is_deleted()


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_disable_jit(entry):
    op = cx.from_matvec(functools.partial(jnp.multiply, 7.0), N)
    with jax.disable_jit():
        assert abs(float(ENTRIES[entry](op)) / 7 - 1) <= 1e-5


def test_a_hessian_under_disable_jit(rng):
    x = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
    p = jnp.asarray(rng.normal(size=6), jnp.float32)

    def loss(p, x):
        return jnp.mean(jnp.log(jnp.cosh(x @ p)))

    slope = 1 / np.cosh(np.asarray(x @ p, np.float64)) ** 2
    truth = np.linalg.eigvalsh((np.asarray(x, np.float64).T * slope) @ x / 40)[::-1]
    with jax.disable_jit():
        op = cx.hessian(loss, p, x, microbatch_size=10)
        result = cx.eigsh(op, 2, which="LA", seed=0)
        estimate = cx.trace(op.at(p), num_matvecs=6, seed=0).estimate
    np.testing.assert_allclose(result.eigenvalues, truth[:2], rtol=1e-4)
    assert abs(estimate - truth.sum()) <= 1e-4 * truth.sum()


def test_arguments_come_by_position():
    """Those by a name would miss `donate`, which counts places."""
    double = compiled.program(donate=(0,))(lambda x: 2 * x)
    with pytest.raises(TypeError, match=r"takes no argument by name, got \['x'\]"):
        double(compiled.Clock(), x=jnp.ones(2))
