"""Flax, step by step: the same small network in NNX and in Linen.

Needs `pip install 'curvax[flax]' scikit-learn`.
"""

# %% Data, and a loss of the outputs and the batch. The ones in `cx.losses` are fused.
import jax
import jax.numpy as jnp
from flax import linen, nnx
from sklearn.datasets import load_digits

import curvax as cx

digits = load_digits()
batch = (
    jnp.asarray(digits.images[:300, ..., None] / 16, jnp.float32),
    jnp.asarray(digits.target[:300]),
)
loss = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])


# %% NNX: the module is put into evaluation mode; its `nnx.Param` are what is differentiated.
class Network(nnx.Module):
    """A convolution, batch normalisation, a linear layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.gelu(self.norm(self.conv(images)))
        return self.head(hidden.reshape(len(hidden), -1))


module = Network(nnx.Rngs(0))
module.eval()
model = cx.adapters.flax.from_nnx(module, loss=loss, example=batch)
print(model)
print(model.verify(hvp=True))
print(cx.eigsh(cx.hessian(model, batch), k=3, seed=0))

# %% One layer, by the path of its attributes.
print(cx.trace(cx.ggn(model, batch, where=cx.match_names("conv.*")), num_matvecs=40, seed=0))


# %% Linen: the module, its variables, and the options of a call that make it deterministic.
class LinenNetwork(linen.Module):
    """The same."""

    @linen.compact
    def __call__(self, images, train):
        hidden = linen.Conv(4, (3, 3))(images)
        hidden = linen.gelu(linen.BatchNorm(use_running_average=not train)(hidden))
        return linen.Dense(10)(hidden.reshape((len(hidden), -1)))


network = LinenNetwork()
variables = network.init(jax.random.key(0), batch[0], train=False)
model = cx.adapters.flax.from_linen(network, variables, loss=loss, example=batch, train=False)
print(model.verify(hvp=True))
print(cx.eigsh(cx.hessian(model, batch), k=3, seed=0))
