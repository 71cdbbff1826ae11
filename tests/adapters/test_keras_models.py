"""Keras models and files: what is taken over, what is refused, and that nothing is changed."""

import importlib.util
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

os.environ.setdefault("KERAS_BACKEND", "jax")
missing = importlib.util.find_spec("keras") is None
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(missing, reason="keras is not installed"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def keras_layers():
    import keras

    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Conv2D(2, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("gelu"),
            keras.layers.AveragePooling2D(2),
            keras.layers.Dropout(0.2),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # that HDF5 is a legacy format
def test_files(suffix, tmp_path):
    from curvax.adapters import keras as adapter

    model = keras_layers()
    model.compile(loss="mse")
    path = tmp_path / f"model{suffix}"
    model.save(path)
    rng = np.random.default_rng(0)
    batch = tuple(rng.standard_normal((12, *s)).astype(np.float32) for s in ((4, 4, 1), (3,)))
    # Keras cannot read the loss from an HDF5 file.
    given = "mse" if suffix == ".h5" else None
    from_file = adapter.from_model(path, loss=given, example=batch)
    in_memory = adapter.from_model(model, example=batch)
    assert from_file.verify(hvp=True).hvp <= 1e-2
    a, b = (cx.eigsh(cx.hessian(m, batch), 3, seed=0, tol=1e-5) for m in (from_file, in_memory))
    np.testing.assert_allclose(a.eigenvalues, b.eigenvalues, rtol=1e-5)


@pytest.mark.parametrize(
    "loss,targets",
    [
        ("mse", "column"),
        ("mae", "column"),
        ("sparse", "labels"),
        ("sparse", "column of labels"),
        ("probabilities", "labels"),
        ("huber", "column"),
    ],
)
def test_losses_are_those_of_keras(loss, targets):
    import keras

    from curvax.adapters import keras as adapter

    keras.utils.set_random_seed(0)
    wide = 1 if targets == "column" else 3
    ends = ["softmax"] if loss == "probabilities" else []
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(wide), *map(keras.layers.Activation, ends)]
    )
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((9, 4)).astype(np.float32), rng.integers(0, 3, 9)
    y = labels[:, None] if targets == "column of labels" else labels
    y = x[:, 0] if targets == "column" else y
    sparse = keras.losses.SparseCategoricalCrossentropy
    loss = {
        "sparse": sparse(from_logits=True),
        "probabilities": sparse(),
        "huber": keras.losses.Huber(),
    }.get(loss, loss)
    op = cx.hessian(adapter.from_model(model, loss=loss, example=(x, y)), (x, y))
    model.compile(loss=loss)
    np.testing.assert_allclose(float(op.loss), model.evaluate(x, y, verbose=0), rtol=1e-5)


@pytest.mark.parametrize("from_logits", [True, False])
def test_ignored_classes_weigh_nothing(from_logits):
    import keras

    from curvax.adapters import keras as adapter

    keras.utils.set_random_seed(0)
    ends = [] if from_logits else [keras.layers.Softmax()]
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), *ends])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits, ignore_class=0)
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    y = np.array([0, 0, 0, 1, 2, 1])
    adapted = adapter.from_model(model, loss=loss)
    one = cx.hessian(adapted, (x, y))
    two = cx.hessian(adapted, [(x[:4], y[:4]), (x[4:], y[4:])])
    eye = jnp.eye(12, dtype=jnp.float32)
    np.testing.assert_allclose(two.product(eye), one.product(eye), atol=1e-6)
    model.compile(loss=loss)
    np.testing.assert_allclose(float(one.loss), model.evaluate(x, y, verbose=0), rtol=1e-5)


def test_bad_input(tmp_path):
    import keras

    from curvax.adapters import keras as adapter

    with pytest.raises(ValueError, match="loss must be Keras's name of a loss.*'zzz'"):
        adapter.from_model(keras_layers(), loss="zzz")
    with pytest.raises(TypeError, match=r"keras\.Model or a path"):
        adapter.from_model(3)
    with pytest.raises(ValueError, match="must be built"):
        adapter.from_model(keras.Sequential([keras.layers.Dense(2)]), loss="mse")
    with pytest.raises(ValueError, match="no loss that it was compiled with: pass loss="):
        adapter.from_model(keras_layers())
    with pytest.raises(ValueError, match="reduction='sum'"):
        loss = keras.losses.MeanSquaredError(reduction="sum")
        adapter.from_model(keras_layers(), loss=loss)
    with pytest.raises(ValueError, match=r"must be a \.keras or \.h5 file"):
        adapter.from_model(tmp_path / "weights.npz")
    with pytest.raises(FileNotFoundError):
        adapter.from_model(tmp_path / "none.keras")
    for name in ("bad.keras", "bad.h5"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ValueError, match="is not the .* that its name says"):
            adapter.from_model(tmp_path / name)
    code = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)])
    code.save(tmp_path / "code.keras")
    with pytest.raises(ValueError, match="cannot be loaded .*(L|l)ambda"):
        adapter.from_model(tmp_path / "code.keras", loss="mse")
    model = keras_layers()
    kernel = model.trainable_variables[0]
    kernel.assign(kernel.value * np.nan)
    with pytest.raises(ValueError, match="conv2d.*/kernel' is not finite"):
        adapter.from_model(model, loss="mse")


def state(model):
    """Everything that a call could change: values of variables, attributes and what they hold."""
    parts = [*model._flatten_layers(), *([model._compile_loss] if model._compile_loss else [])]
    attributes = []
    for part in parts:
        for name, value in sorted(vars(part).items()):
            held = [*value, *value.values()] if isinstance(value, dict) else value
            held = sorted(map(id, held)) if isinstance(held, (list, set, tuple)) else None
            attributes.append((name, id(value), held))
    values = [np.asarray(v.value).tobytes() for v in [*model.variables, *model.metrics_variables]]
    return attributes, values


@pytest.fixture
def unchanged():
    """`unchanged(model)`: the model is then as it is now when the test ends."""
    watched = []

    def watch(model):
        watched.append((model, state(model)))
        return model

    yield watch
    for model, before in watched:
        assert state(model) == before


def noting(dropout=0.0, **options):
    """A model that notes in attributes what it is called on, adds losses and has random layers."""
    import keras

    class Noting(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls, self.table = [], {}

        def call(self, x):
            self.calls.append(x)
            self.table["last"] = self.last = x
            self.add_loss(keras.ops.mean(x**2))
            return x

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(3), Noting(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # that HDF5 is a legacy format
def test_a_file_that_tensorflow_saved(suffix, tmp_path):
    """The model of the post "Hessian analysis with JAX", and the eigenvalues that it prints."""
    from curvax.adapters import keras as adapter

    path = tmp_path / f"model{suffix}"
    shutil.copy(Path(__file__).parent / "data" / f"post-tensorflow-model{suffix}", path)
    batch = (np.array([[1.0, 2], [3, 4]], np.float32), np.array([[5.0], [6]], np.float32))
    op = cx.hessian(adapter.from_model(path, loss="mse", example=batch), batch)
    values = cx.eigsh(op, 6, which="LM", seed=0, tol=1e-6).eigenvalues
    posted = [-1.2113413, -0.8476425, 0.13638566, 0.99271876, 1.5289528, 109.21992]
    np.testing.assert_allclose(np.sort(values), posted, rtol=2e-5)


def test_the_model_is_unchanged(unchanged):
    from curvax.adapters import keras as adapter

    x, y = np.ones((4, 2), np.float32), np.array([0, 1, 2, 0])
    model = unchanged(noting())
    cx.hessian(adapter.from_model(model, example=(x, y)), (x, y))


def test_arrays_that_keras_gives_away():
    """`fit` deletes the arrays of the variables; what was adapted before stays what it was."""
    from curvax.adapters import keras as adapter

    x, y = np.ones((4, 2), np.float32), np.array([0, 1, 2, 0])
    model = noting()
    own = adapter.from_model(model, example=(x, y))
    before = float(cx.hessian(own, (x, y)).loss)
    model.fit(x, y, verbose=0)
    assert float(cx.hessian(own, (x, y)).loss) == before


BATCHES = [
    ("no labels", lambda x, y: (x,), "must have targets"),
    ("of four", lambda x, y: (x, y, None, None), "as for Keras, got a tuple of 4"),
    ("other keys", lambda x, y: {"x": x, "y": y}, "(inputs|structure|float32|dict)"),
    ("wide inputs", lambda x, y: (np.ones((4, 5), np.float32), y), "float32.4, 5."),
    ("labels of another head", lambda x, y: (x, y + 1), "labels from 0 to 2.*got 3"),
    ("targets of another head", lambda x, y: (x, np.ones((4, 2))), r"shape \(4,\).*got \(4, 2\)"),
    ("two targets", lambda x, y: (x, [y, y]), "structures"),
    ("short labels", lambda x, y: (x, y[:2]), r"shape \(4,\).*got \(2,\)"),
]


@pytest.mark.parametrize("batch,match", [pytest.param(*c[1:], id=c[0]) for c in BATCHES])
def test_batches_that_do_not_fit(batch, match, unchanged):
    from curvax.adapters import keras as adapter

    given = batch(np.ones((4, 2), np.float32), np.array([0, 1, 2, 0]))
    model = unchanged(noting())
    with pytest.raises((ValueError, TypeError, KeyError), match=match) as caught:
        adapter.from_model(model, example=given)
    assert "The batch is" in str(caught.value.__notes__)
    with pytest.raises(ValueError, match="at least one batch, got an empty"):
        cx.hessian(adapter.from_model(model), iter(()))


@pytest.mark.parametrize("container", [list, dict])
def test_targets_of_other_names(container, unchanged):
    import keras

    from curvax.adapters import keras as adapter

    start = keras.Input((2,))
    heads = {name: keras.layers.Dense(2, name=name)(start) for name in ("a", "b")}
    model = keras.Model(start, heads if container is dict else list(heads.values()))
    model.compile(loss="mse")
    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"keys of the model's outputs, \['a', 'b'\], got"):
        adapter.from_model(unchanged(model), example=(x, {"a": x, "c": x}))
    with pytest.raises(ValueError, match=r"loss must have the structure of the outputs"):
        adapter.from_model(model, loss=["mse"] * 3, example=(x, [x, x]))


def test_models_that_cannot_be_analysed(unchanged):
    import keras

    from curvax.adapters import keras as adapter

    def made(*layers):
        return keras.Sequential([keras.Input((4,)), *layers])

    for policy in ("mixed_float16", "bfloat16"):
        narrow = made(keras.layers.Dense(3, dtype=policy, name="narrow"))
        with pytest.raises(ValueError, match=f"'narrow' computes in .*{policy}.*set_weights"):
            adapter.from_model(unchanged(narrow), loss="mse")
    dense = keras.layers.Dense(3, name="coarse")
    quantised = made(dense)
    dense.quantize("int8")
    with pytest.raises(ValueError, match="'coarse' is, to int8.*before quantize"):
        adapter.from_model(unchanged(quantised), loss="mse")
    frozen = made(keras.layers.Dense(3, trainable=False))
    with pytest.raises(ValueError, match="must have parameters .* are all frozen"):
        adapter.from_model(unchanged(frozen), loss="mse")


def test_layers_in_train_mode(unchanged):
    import keras

    from curvax.adapters import keras as adapter

    class Training(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.dense, self.layer = keras.layers.Dense(2), layer

        def call(self, x):
            return self.layer(self.dense(x), training=True)

    batch = np.ones((4, 2), np.float32), np.ones((4, 2), np.float32)
    for layer, what in (
        (keras.layers.Dropout(0.5), "draws random numbers.*seed"),
        (keras.layers.BatchNormalization(), "normalises by the batch.*moving_mean"),
    ):
        model = Training(layer)
        model(batch[0])
        with pytest.raises(ValueError, match=f"{what}.*follow the argument training"):
            adapter.from_model(unchanged(model), loss="mse", example=batch)
        with pytest.raises(ValueError, match=what):
            adapter.from_model(model, loss=lambda out, b: jnp.mean(out**2), example=batch)


def test_losses_that_do_not_exist(unchanged):
    from curvax.adapters import keras as adapter

    model = unchanged(noting())
    for loss, got in (("msee", "'msee'"), (["mse", "zzz"], "'zzz'"), ({"a": "yyy"}, "'yyy'")):
        with pytest.raises(ValueError, match=f"loss must be Keras's name of a loss.*got {got}"):
            adapter.from_model(model, loss=loss)
    with pytest.raises(TypeError, match=r"loss must be what compile takes.*got 3"):
        adapter.from_model(model, loss=3)
    with pytest.raises(TypeError, match="class_weight must map classes to weights.*got 3"):
        adapter.from_model(model, class_weight=3)
    with pytest.raises(ValueError, match="class_weight is for losses of Keras"):
        adapter.from_model(model, loss=lambda outputs, batch: 0.0, class_weight={0: 1.0})
    with pytest.raises(ValueError, match="loss must have the structure of the outputs"):
        x = np.ones((4, 2), np.float32)
        adapter.from_model(model, loss={"two": "mse", "three": "mse"}, example=(x, x))


def test_a_linear_model_in_float64():
    """Keras computes its loss in float32 there, which is no difference of the models."""
    import jax
    import keras

    from curvax.adapters import keras as adapter

    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        model = keras.Sequential([keras.Input((3,), dtype="float64")])
        model.add(keras.layers.Dense(1, dtype="float64"))
        model.compile(loss="mse")
        batch = (rng.standard_normal((6, 3)), rng.standard_normal((6, 1)))
        op = cx.hessian(adapter.from_model(model, example=batch), batch)
        design = np.concatenate([np.ones((6, 1)), batch[0]], 1)
        by_name = {name.rpartition("/")[2]: i for i, name in enumerate(op.space.names)}
        columns = [0, 1, 2, 3] if by_name["bias"] == 0 else [1, 2, 3, 0]
        wanted = 2 / 6 * (design.T @ design)[np.ix_(columns, columns)]
        np.testing.assert_allclose(op.product(jnp.eye(4)), wanted, rtol=1e-12, atol=1e-12)
