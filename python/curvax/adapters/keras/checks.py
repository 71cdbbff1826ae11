"""What no model of Keras may be."""

import jax
import jax.numpy as jnp
import keras
import numpy as np

from curvax.adapters.keras.network import Network
from curvax.typing import PyTree


def check_model(model: keras.Model) -> None:
    """Refuse what cannot be analysed, whatever its loss.

    Raises:
        TypeError: not a Keras model.
        ValueError: not built, variables of one path, or weights that are not in 32 or 64 bits.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model or a path, got {type(model).__name__}")
    if not model.built:
        raise ValueError("model must be built: call it once on a batch, or model.build(shape)")
    trainable = [variable.path for variable in model.trainable_variables]
    if len(set(trainable)) != len(trainable):
        double = sorted({path for path in trainable if trainable.count(path) > 1})
        raise ValueError(f"the model's variables must have different paths, got twice: {double}")
    for layer in model._flatten_layers():
        if layer.quantization_mode is not None:
            raise ValueError(
                f"the model must not be quantised: layer {layer.name!r} is, to "
                f"{layer.quantization_mode}. Analyse the model as it was before quantize()"
            )
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                f"the model must compute in float32 or float64: layer {layer.name!r} computes in "
                f"{layer.compute_dtype} (dtype policy {layer.dtype_policy.name!r}), too coarse for "
                "second derivatives. Build it under keras.config.set_dtype_policy('float32') and "
                "take over its weights: new.set_weights(model.get_weights())"
            )
    for variable in model.trainable_variables:
        if variable.dtype not in ("float32", "float64"):
            raise ValueError(
                f"the model's trainable variables must be float32 or float64, got {variable.dtype} "
                f"for {variable.path!r}: build it in float32 and take over its weights by "
                "new.set_weights(model.get_weights())"
            )


def check_steps(model: keras.Model) -> None:
    """Refuse a class that computes its loss where it cannot be read.

    Raises:
        ValueError: as said.
    """
    for name in ("train_step", "test_step", "compute_loss_and_updates"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"the model's class, {type(model).__name__}, has a {name} of its own, which may "
                "compute another loss than the one compiled: pass loss=, what compile takes or a "
                "function loss(outputs, batch), or write the loss as compute_loss"
            )


def check_weights(weights: PyTree) -> None:
    """Refuse weights of samples under which a loss is no mean, which Keras computes with.

    Raises:
        ValueError: as said.
    """
    for leaf in map(np.asarray, jax.tree.leaves(weights)):
        good = np.isfinite(leaf) & (leaf >= 0)
        if not good.all():
            raise ValueError(
                "the weights of samples and classes must be finite and not negative, got "
                f"{leaf[~good].flat[0]:g}"
            )


def check_state(network: Network, state: PyTree) -> None:
    """Refuse a model that draws random numbers, or normalises by the batch.

    Args:
        network: the model.
        state: its other variables after a call.

    Raises:
        ValueError: as said.
    """
    metrics = {id(variable) for variable in network.model.metrics_variables}
    pairs = zip(network.model.non_trainable_variables, network.others, state, strict=True)
    for variable, before, after in pairs:
        counts = not jnp.issubdtype(before.dtype, jnp.floating) and "seed" not in variable.path
        if id(variable) in metrics or counts or np.array_equal(before, after, equal_nan=True):
            continue
        seed = "seed" in variable.path
        what = "draws random numbers" if seed else "normalises by the batch, or keeps statistics"
        raise ValueError(
            f"the model must compute the same in every call with training=False: it {what}, since "
            f"{variable.path!r} changes. Let layers follow the argument training, in place of "
            "training=True of their own"
        )
