"""Flax, Equinox and Keras: products in float64 against central differences."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

os.environ.setdefault("KERAS_BACKEND", "jax")
pytestmark = pytest.mark.frameworks
LOSS = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


def images(dtype=np.float64, classes=3):
    rng = np.random.default_rng(0)
    return rng.standard_normal((12, 6, 6, 1)).astype(dtype), rng.integers(0, classes, 12)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def widest():
    return jnp.asarray(0.0).dtype


def nnx_cnn():
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self, rngs):
            kinds = {"rngs": rngs, "param_dtype": widest()}
            self.conv, self.norm = nnx.Conv(1, 4, (3, 3), **kinds), nnx.BatchNorm(4, **kinds)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(144, 5, **kinds), nnx.Linear(5, 3, **kinds)])

        def __call__(self, x):
            x = nnx.gelu(self.norm(self.conv(x)))
            x = self.drop(x.reshape(len(x), -1))
            return self.layers[1](nnx.tanh(self.layers[0](x)))

    module = CNN(nnx.Rngs(0))
    module.norm.mean[...] += 0.3
    return module


def linen_cnn():
    from flax import linen

    class CNN(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Conv(4, (3, 3), param_dtype=widest())(x)
            x = linen.BatchNorm(use_running_average=not train, param_dtype=widest())(x)
            x = linen.Dropout(0.1, deterministic=not train)(linen.gelu(x).reshape((len(x), -1)))
            return linen.Dense(3, param_dtype=widest())(x)

    module = CNN()
    x = jnp.asarray(images(widest())[0])
    variables = module.init(jax.random.key(0), x, train=False)
    # The statistics too: XLA rounds the inverse root of float32 constants by where it computes it.
    return module, jax.tree.map(lambda leaf: leaf.astype(widest()), variables)


def equinox_cnn():
    import equinox as eqx

    class CNN(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        head: eqx.nn.MLP

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(1, 4, 3, padding=1, key=first)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.drop = eqx.nn.Dropout(0.1)
            self.head = eqx.nn.MLP(144, 3, 8, 1, activation=jax.nn.gelu, key=second)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.head(self.drop(jax.nn.silu(x).reshape(-1))), state

    return eqx.nn.make_with_state(CNN)(jax.random.key(0))


def nnx_model(batch):
    from curvax.adapters import flax

    module = nnx_cnn()
    module.eval()
    return flax.from_nnx(module, loss=LOSS, example=batch)


def linen_model(batch):
    from curvax.adapters import flax

    return flax.from_linen(*linen_cnn(), loss=LOSS, example=batch, train=False)


def equinox_model(batch):
    import equinox as eqx

    from curvax.adapters import equinox

    module, state = equinox_cnn()
    module = eqx.nn.inference_mode(module)
    channels_first = equinox.from_module(
        module, loss=LOSS, state=state, inputs=lambda b: jnp.moveaxis(b[0], -1, 1), example=batch
    )
    return channels_first


def keras_layers(dtype, normalised=True):
    import keras

    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        return keras.Sequential(
            [
                keras.Input((6, 6, 1), dtype=dtype),
                keras.layers.Conv2D(4, 3),
                *([keras.layers.BatchNormalization()] if normalised else []),
                keras.layers.Activation("gelu"),
                keras.layers.AveragePooling2D(2),
                keras.layers.Dropout(0.2),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
    finally:
        keras.config.set_dtype_policy(before)


def keras_model(batch):
    import keras

    from curvax.adapters import keras as adapter

    # Keras normalises in float32, whatever the dtype.
    model = keras_layers("float64", normalised=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return adapter.from_model(model, loss=loss, example=batch)


MODELS = [
    pytest.param(nnx_model, {"conv.kernel", "layers.1.bias"}, marks=needs("flax"), id="nnx"),
    pytest.param(linen_model, {"Conv_0.kernel", "Dense_0.bias"}, marks=needs("flax"), id="linen"),
    pytest.param(
        equinox_model,
        {"conv.weight", "head.layers.0.weight"},
        marks=needs("equinox"),
        id="equinox",
    ),
    pytest.param(keras_model, {"/kernel", "/bias"}, marks=needs("keras"), id="keras"),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("make,names", MODELS)
def test_a_model_against_central_differences(make, names, x64):
    batch = images()
    model = make(batch)
    op = cx.hessian(model, batch)
    assert op.dtype == np.float64
    assert all(any(known.endswith(name) for known in op.space.names) for name in names)
    v = op.unravel(jnp.asarray(np.random.default_rng(1).standard_normal(op.shape[0])))
    gradient = jax.jit(jax.grad(lambda p: model.objective(p, tuple(map(jnp.asarray, batch)))[0]))

    def at(h):
        return op.ravel(gradient(jax.tree.map(lambda p, d: p + h * d, model.params, v)))

    # Fourth order: the error of second order alone is near the limit.
    h = 1e-4
    wanted = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    got = op.ravel(op @ v)
    assert np.linalg.norm(got - wanted) <= 1e-8 * np.linalg.norm(wanted)
    assert model.verify(hvp=True).reference == "central differences"
    # The exact Fisher matrix of a softmax is the Gauss-Newton matrix.
    ggn, fisher = cx.ggn(model, batch), cx.fisher(model, batch, kind="exact")
    np.testing.assert_allclose(
        ggn.ravel(ggn @ v), fisher.ravel(fisher @ v), atol=1e-12 * float(jnp.abs(got).max())
    )


@needs("flax")
class TestFlax:
    def test_train_mode_is_refused(self):
        from curvax.adapters import flax

        with pytest.raises(ValueError, match=r"Call module\.eval\(\)"):
            flax.from_nnx(nnx_cnn(), loss=LOSS)
        with pytest.raises(ValueError, match="such as train=False"):
            flax.from_linen(*linen_cnn(), loss=LOSS, example=images(np.float32), train=True)

    def test_modules_that_change_in_a_call(self):
        from flax import nnx

        from curvax.adapters import flax

        class Noisy(nnx.Module):
            def __init__(self, rngs):
                self.linear, self.rngs = nnx.Linear(3, 3, rngs=rngs), rngs

            def __call__(self, x):
                self.seen = x.shape
                return self.linear(x) + jax.random.normal(self.rngs.noise(), x.shape)

        module = Noisy(nnx.Rngs(0))
        before = jax.tree.map(str, nnx.to_pure_dict(nnx.state(module)))
        batch = (np.ones((4, 3), np.float32), np.array([0, 1, 2, 0]))
        with pytest.raises(ValueError, match=r"'rngs\..*count' changes"):
            flax.from_nnx(module, loss=LOSS, example=batch)
        assert jax.tree.map(str, nnx.to_pure_dict(nnx.state(module))) == before
        assert not hasattr(module, "seen")

    def test_parameters_that_are_too_coarse(self):
        from flax import nnx

        from curvax.adapters import flax

        for dtype in (jnp.bfloat16, jnp.int8):
            module = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            module.kernel = nnx.Param(jnp.ones((3, 3), dtype))
            with pytest.raises(ValueError, match=r"'kernel' must be float32 or float64, got"):
                flax.from_nnx(module, loss=LOSS)

    def test_shared_parameters_are_one_leaf(self):
        from flax import nnx

        from curvax.adapters import flax

        class Tied(nnx.Module):
            def __init__(self, rngs):
                self.a = nnx.Linear(4, 4, rngs=rngs)
                self.b = nnx.Linear(4, 4, rngs=rngs)
                self.b.kernel = self.a.kernel

            def __call__(self, x):
                return self.b(nnx.tanh(self.a(x)))

        rng = np.random.default_rng(0)
        batch = tuple(rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
        loss = cx.losses.MeanSquaredError(lambda b: b[1])
        model = flax.from_nnx(Tied(nnx.Rngs(0)), loss=loss, example=batch)
        op = cx.hessian(model, batch)
        assert op.shape == (24, 24)
        assert model.verify(hvp=True).hvp <= 1e-3

    def test_bad_input(self):
        from flax import nnx

        from curvax.adapters import flax

        with pytest.raises(TypeError, match=r"flax\.nnx\.Module, got int"):
            flax.from_nnx(3, loss=LOSS)
        with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
            flax.from_linen(lambda x: x, {}, loss=LOSS)
        module, variables = linen_cnn()
        with pytest.raises(ValueError, match="with 'params'"):
            flax.from_linen(module, variables["params"], loss=LOSS)
        broken = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        broken.bias[...] = jnp.nan
        with pytest.raises(ValueError, match=r"'bias' is not finite: 3 of 3"):
            flax.from_nnx(broken, loss=LOSS)
        with pytest.raises(ValueError, match="must have parameters"):
            flax.from_nnx(nnx.Dropout(0.0), loss=LOSS)


@needs("equinox")
class TestEquinox:
    def test_train_mode_is_refused(self):
        import equinox as eqx

        from curvax.adapters import equinox

        module, state = equinox_cnn()
        with pytest.raises(ValueError, match=r"BatchNorm.*equinox\.nn\.inference_mode"):
            equinox.from_module(module, loss=LOSS, state=state)
        dropping = eqx.nn.Sequential(
            [eqx.nn.Linear(3, 3, key=jax.random.key(0)), eqx.nn.Dropout(0.4)]
        )
        with pytest.raises(ValueError, match=r"Dropout drops out with p = 0\.4"):
            equinox.from_module(dropping, loss=LOSS)

    def test_a_module_of_whole_batches(self):
        import equinox as eqx

        from curvax.adapters import equinox

        linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))

        class Whole(eqx.Module):
            inner: eqx.nn.Linear

            def __call__(self, x):
                return jax.vmap(self.inner)(x)

        batch = (np.ones((5, 3), np.float32), np.ones((5, 2), np.float32))
        loss = cx.losses.MeanSquaredError(lambda b: b[1])
        one = equinox.from_module(linear, loss=loss, example=batch)
        whole = equinox.from_module(Whole(linear), loss=loss, batched=True, example=batch)
        values = [cx.eigsh(cx.hessian(m, batch), 2, seed=0).eigenvalues for m in (one, whole)]
        np.testing.assert_allclose(*values, rtol=1e-6)
        np.testing.assert_allclose(values[0], [4.0, 4.0], rtol=1e-5)  # (2/10)·5·(3 + 1)

    def test_bad_input(self):
        import equinox as eqx

        from curvax.adapters import equinox

        for wrong in (3, lambda x: x, eqx.Module()):
            with pytest.raises(TypeError, match=r"callable equinox\.Module"):
                equinox.from_module(wrong, loss=LOSS)
