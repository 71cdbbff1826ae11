"""Flax and Equinox: gradients that a model defines itself, and batches that do not fit."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

pytestmark = pytest.mark.frameworks
LOSS = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


@jax.custom_vjp
def tripled(x):
    """Itself, with another gradient than that of the forward pass."""
    return x


tripled.defvjp(lambda x: (x, x), lambda x, g: (3 * g * x,))


@jax.custom_vjp
def nested(x):
    """With a backward pass that refuses forward mode."""
    return x


nested.defvjp(lambda x: (x, x), lambda x, g: (g * tripled(x),))


@jax.custom_jvp
def doubled(x):
    return x


doubled.defjvp(lambda primals, tangents: (primals[0], 2 * primals[0] * tangents[0]))


@jax.custom_vjp
def blocked(x):
    return jnp.sin(x)


def cosine(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.cos, shape, x, vmap_method="expand_dims")


blocked.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * cosine(x),))


def linear_then(library, last):
    """A linear layer and a function: the model's maker, its kernel `(in, out)` and its bias."""
    key = jax.random.key(0)
    loss = cx.losses.MeanSquaredError(lambda b: b[1])
    if library == "equinox":
        import equinox as eqx

        from curvax.adapters import equinox

        class Whole(eqx.Module):
            linear: eqx.nn.Linear

            def __call__(self, x):
                return last(self.linear(x))

        linear = eqx.nn.Linear(3, 2, key=key)
        make = functools.partial(equinox.from_module, Whole(linear), loss=loss)
        return make, linear.weight.T, linear.bias
    from flax import linen, nnx

    from curvax.adapters import flax

    if library == "linen":

        class Deep(linen.Module):
            @linen.compact
            def __call__(self, x):
                return last(linen.Dense(2)(x))

        variables = Deep().init(key, jnp.ones((1, 3)))
        kernel, bias = (variables["params"]["Dense_0"][name] for name in ("kernel", "bias"))
        return functools.partial(flax.from_linen, Deep(), variables, loss=loss), kernel, bias

    class Module(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return last(self.linear(x))

    module = Module()
    make = functools.partial(flax.from_nnx, module, loss=loss)
    return make, module.linear.kernel[...], module.linear.bias[...]


LIBRARIES = [
    pytest.param("nnx", marks=needs("flax")),
    pytest.param("linen", marks=needs("flax")),
    pytest.param("equinox", marks=needs("equinox")),
]


class TestRules:
    """Gradients that a model defines itself."""

    @pytest.mark.parametrize("rule", [tripled, nested, doubled, jax.lax.stop_gradient])
    @pytest.mark.parametrize("library", LIBRARIES)
    def test_the_hessian_is_the_derivative_of_that_gradient(self, library, rule):
        rng = np.random.default_rng(0)
        x, y = (rng.standard_normal((5, n)).astype(np.float32) for n in (3, 2))
        make, kernel, bias = linear_then(library, lambda z: rule(z) + z**2)
        slopes = {tripled: lambda z: 3 * z, nested: tripled, doubled: lambda z: 2 * z}
        slope = slopes.get(rule, lambda z: 0)

        def gradient(bias):
            z = x @ kernel + bias
            out = jax.lax.stop_gradient(z) if rule is jax.lax.stop_gradient else z
            return ((slope(z) + 2 * z) * 2 * (out + z**2 - y) / y.size).sum(0)

        where = cx.match_names("*bias")
        op = cx.hessian(make(example=(x, y)), (x, y), where=where)
        wanted = jax.jacobian(gradient)(bias)
        got = op.product(jnp.eye(2, dtype=op.dtype))
        np.testing.assert_allclose(got, np.transpose(wanted), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_what_has_no_second_derivative(self, library):
        batch = (np.ones((5, 3), np.float32), np.ones((5, 2), np.float32))
        make, *_ = linear_then(library, blocked)
        with pytest.raises(TypeError, match=r"twice: .*custom_jvp.*method='finite_difference'"):
            make(example=batch)
        make, *_ = linear_then(library, lambda z: jax.lax.while_loop(lambda c: False, jnp.sin, z))
        with pytest.raises(TypeError, match="has no gradient.*while_loop.*jax.custom_jvp"):
            make(example=batch)


class TestBatches:
    @pytest.mark.parametrize("library", LIBRARIES)
    def test_batches_that_do_not_fit(self, library):
        make, *_ = linear_then(library, jnp.tanh)
        x, y = np.ones((5, 3), np.float32), np.ones((5, 2), np.float32)
        for batch, error, match in (
            ((x,), TypeError, r"must be a tuple \(inputs, targets\), got a tuple of 1"),
            ({"x": x}, TypeError, "got a dict with the keys"),
            ((x, y[:, :1]), ValueError, r"targets must have the shape of outputs, \(5, 2\)"),
            ((y, y), Exception, "3"),
            ((x, np.full((5, 2), np.nan)), ValueError, "the loss is nan on the batch"),
        ):
            with pytest.raises(error, match=match) as caught:
                make(example=batch)
            assert "The batch is" in str(getattr(caught.value, "__notes__", ""))
        with pytest.raises(ValueError, match="at least one batch, got an empty"):
            cx.hessian(make(), iter(()))
        with pytest.raises(TypeError, match=r"loss\(outputs, batch\), got 'mse'"):
            make(loss="mse")

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_labels_of_another_head(self, library):
        make, *_ = linear_then(library, jnp.tanh)
        batch = (np.ones((5, 3), np.float32), np.array([0, 1, 2, 0, 1]))
        with pytest.raises(ValueError, match=r"labels .*2") as caught:
            make(example=batch, loss=LOSS)
        assert "The batch is" in str(caught.value.__notes__)
