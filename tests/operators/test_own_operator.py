"""Operators that users write: what they must be, and what they are told where they are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

N = 6
CALLS = {
    "matvec": lambda op: op @ jnp.ones(N),
    "matmat": lambda op: op @ jnp.ones((3, N)),
    "eigsh": lambda op: cx.eigsh(op, 1, seed=0),
    "trace": lambda op: cx.trace(op, num_matvecs=4, method="hutchinson", seed=0),
    "exact": lambda op: cx.diagonal(op, seed=0),
    "density": lambda op: cx.spectral_density(op, num_steps=3, seed=0),
    "sum": lambda op: (op + cx.identity(N)) @ jnp.ones(N),
    "congruence": lambda op: op.congruence(jnp.ones(N)) @ jnp.ones(N),
    "projection": lambda op: op.project_off(jnp.ones(N)) @ jnp.ones(N),
    "solve": lambda op: cx.solve(op, jnp.ones(N)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Own(cx.Operator):
    """Twice the identity, in some form."""

    form: object = dataclasses.field(metadata={"static": True})
    space: cx.VectorSpace = dataclasses.field(
        default=cx.VectorSpace.of(jnp.ones(N), jnp.float32), metadata={"static": True}
    )

    def product(self, block):
        return self.form(2 * block)


def test_as_it_should_be():
    for call in CALLS.values():
        call(Own(lambda x: x))
    np.testing.assert_array_equal(Own(lambda x: x) @ jnp.ones(N), np.full(N, 2.0))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "form,error,message",
    [
        (lambda x: x.sum(0), ValueError, r"Own.product must return the shape .*\(b, n\) = .*got"),
        (lambda x: x[:, :1], ValueError, r"Own.product must return the shape .*\(b, n\) = .*got"),
        (lambda x: x.astype(jnp.int32), TypeError, "must return an array of float32, got int32"),
        (lambda x: (x,), TypeError, "must return an array of float32, got tuple"),
    ],
)
def test_products(name, form, error, message):
    with pytest.raises(error, match=message):
        CALLS[name](Own(form))


@pytest.mark.parametrize("name", ["matvec", "eigsh", "trace"])
def test_not_registered(name):
    class Plain(cx.Operator):
        space = cx.VectorSpace.of(jnp.ones(N), jnp.float32)

        def product(self, block):
            return block

    with pytest.raises(TypeError, match=r"Plain must be a pytree.*register_dataclass"):
        CALLS[name](Plain())


@pytest.mark.parametrize("name", ["matvec", "eigsh", "trace"])
def test_without_a_space(name):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False, repr=False)
    class Lost(cx.Operator):
        def product(self, block):
            return block

    with pytest.raises(TypeError, match="Lost.space must be a VectorSpace"):
        CALLS[name](Lost())


def test_dtype_of_a_space():
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got int32"):
        cx.VectorSpace.of(jnp.ones(N), jnp.int32)


class TestAlgebra:
    A, B = Own(lambda x: x), cx.identity(N)

    def test_python_sum(self):
        np.testing.assert_array_equal(sum([self.A, self.B]) @ jnp.ones(N), np.full(N, 3.0))
        with pytest.raises(TypeError, match="unsupported operand"):
            1 + self.A

    def test_products_of_operators(self):
        with pytest.raises(TypeError, match=r"not symmetric.*A @ \(B @ v\)"):
            self.A @ self.B

    def test_numbers_that_overflow(self):
        with pytest.raises(ValueError, match=r"finite in float32, got 1e\+60"):
            1e60 * self.A
