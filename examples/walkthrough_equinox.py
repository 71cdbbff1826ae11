"""Equinox, step by step: an MLP on handwritten digits.

Needs `pip install 'curvax[equinox]' scikit-learn`.
"""

# %% A module of Equinox takes one sample.
import equinox as eqx
import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

import curvax as cx

digits = load_digits()
batch = (jnp.asarray(digits.data[:300] / 16, jnp.float32), jnp.asarray(digits.target[:300]))
first, second = jax.random.split(jax.random.key(0))
module = eqx.nn.Sequential(
    [
        eqx.nn.MLP(64, 24, 24, 1, activation=jax.nn.gelu, key=first),
        eqx.nn.Dropout(0.1),
        eqx.nn.Linear(24, 10, key=second),
    ]
)

# %% Dropout must be off; the module is mapped over the batch, and its floating arrays are the
# parameters.
model = cx.adapters.equinox.from_module(
    eqx.nn.inference_mode(module),
    loss=cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1]),
    example=batch,
)
print(model)
print(model.verify(hvp=True))

# %% Eigenvectors have the structure of the module.
pairs = cx.eigsh(cx.hessian(model, batch), k=3, seed=0)
print(pairs)
print(pairs.eigenvectors.layers[0].layers[0].weight.shape)

# %% The density of all eigenvalues.
print(cx.spectral_density(cx.hessian(model, batch), num_runs=4, num_steps=40, seed=0))
