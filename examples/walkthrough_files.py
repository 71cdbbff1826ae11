"""Parameters from files, step by step: weights of another program, a forward pass of one's own.

Needs nothing but curvax; `.safetensors` and `.gguf` files need `pip install 'curvax[files]'`.
"""

# %% What another program wrote: here a JSON of nested lists, as in the post "Hessian analysis with
# JAX", and the same as NPZ.
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import curvax as cx

weights = {
    "fc1.weight": [[0.3645523, 0.9664639], [-0.5033512, -0.4280049]],
    "fc1.bias": [-0.0550507, 0.2033689],
    "fc2.weight": [[0.9411813, -0.4964321]],
    "fc2.bias": [0.6310059],
}
folder = Path(tempfile.mkdtemp())
(folder / "weights.json").write_text(json.dumps(weights))
np.savez(folder / "weights.npz", **{k: np.float32(v) for k, v in weights.items()})

# %% Either becomes a dict of arrays. Formats that can run code when they are loaded are refused.
params = cx.adapters.files.load(folder / "weights.json")
print({name: leaf.shape for name, leaf in params.items()})
try:
    cx.adapters.files.load(folder / "weights.pt")
except ValueError as error:
    print(error)


# %% The forward pass, on a whole batch, makes it a model.
def forward(params, batch):
    """Two linear layers."""
    hidden = batch[0] @ params["fc1.weight"].T + params["fc1.bias"]
    return hidden @ params["fc2.weight"].T + params["fc2.bias"]


batch = (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[5.0], [6.0]]))
model = cx.Model(params, forward, cx.losses.MeanSquaredError(lambda batch: batch[1]))
print(cx.eigsh(cx.hessian(model, batch), k=6, seed=0))
