"""The TensorFlow example of the post "Hessian analysis with JAX", in Keras 3 on JAX.

`tf.keras` became `keras`, and what the post defines as its core module comes from `curvax.compat`;
the rest is the post's. Needs `pip install 'curvax[keras]'`.
"""

# %% The model, and its training.
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
import numpy as np

from curvax.compat import EigshArgs, HessianAnalyzer, generate_MSE_loss_func

keras.utils.set_random_seed(0)
X_np = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
Y_np = np.array([5.0, 6.0], dtype=np.float32).reshape(-1, 1)

model = keras.Sequential(
    [
        keras.Input((2,)),
        keras.layers.Dense(2, name="dense_1", activation=None, use_bias=True),
        keras.layers.Dense(1, name="dense_2", activation=None, use_bias=True),
    ]
)
model.compile(optimizer=keras.optimizers.SGD(learning_rate=0.01), loss="mse")
model.fit(X_np, Y_np, epochs=2, batch_size=2, verbose=0)


# %% The mediating objects.
def extract_tf_model_parameters(model):
    """Kernels and biases by layer."""
    param_dict = {}
    for layer in model.layers:
        weights = layer.get_weights()
        if weights:
            kernel, bias = weights
            param_dict[f"{layer.name}/kernel"] = kernel.tolist()
            param_dict[f"{layer.name}/bias"] = bias.tolist()
    return param_dict


def forward_copy_tf(params, x):
    """The model, on one sample."""
    w1, b1 = jnp.array(params["dense_1/kernel"]), jnp.array(params["dense_1/bias"])
    w2, b2 = jnp.array(params["dense_2/kernel"]), jnp.array(params["dense_2/bias"])
    x = jnp.dot(x, w1) + b1
    return jnp.dot(x, w2) + b2


params = extract_tf_model_parameters(model)
MSE_loss_copy_tf = generate_MSE_loss_func(params, X_np, Y_np, forward_copy_tf)

# %% The spectrum.
ha = HessianAnalyzer(params, X_np, Y_np, forward_copy_tf, MSE_loss_copy_tf, dtype=jnp.float32)
eigvals, eigvecs = ha.get_spectrum(EigshArgs(k=6, which="LM", tol=0.001))
print(eigvals)
print(eigvecs.shape)
