"""Keras 3, step by step: a classifier of handwritten digits.

Needs `pip install 'curvax[keras]' scikit-learn`. Keras runs on JAX; a file that was saved under
TensorFlow loads all the same.
"""

# %% The backend is chosen before Keras is imported, and never again.
import os

os.environ["KERAS_BACKEND"] = "jax"

import tempfile
from pathlib import Path

import keras
from sklearn.datasets import load_digits

keras.utils.set_random_seed(0)
digits = load_digits()
x, y = (digits.data[:600] / 16.0).astype("float32"), digits.target[:600]

network = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(16, activation="gelu", name="hidden"),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(10, name="logits"),
    ]
)
network.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
network.fit(x, y, epochs=5, verbose=0)

# %% Convert it: the loss is the one that it was compiled with, dropout is off.
import curvax as cx  # noqa: E402

model = cx.adapters.keras.from_model(network, example=(x[:50], y[:50]))
print(model)
print(model.verify(hvp=True))

# %% Eigenvalues, and the diagonal of one layer's Gauss-Newton matrix.
print(cx.eigsh(cx.hessian(model, (x, y)), k=(3, 2), which="BE", seed=0))
print(cx.diagonal(cx.ggn(model, (x, y), where=cx.match_names("*logits*")), seed=0))

# %% From a file. What would run code on load, Keras refuses.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "network.keras"
    network.save(path)
    again = cx.adapters.keras.from_model(path, example=(x[:50], y[:50]))
print(cx.eigsh(cx.hessian(again, (x, y)), k=1, seed=0))
