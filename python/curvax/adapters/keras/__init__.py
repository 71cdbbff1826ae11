"""Models of Keras 3 on its JAX backend, and its files (the extra `keras`).

A `.keras` or `.h5` file saved under TensorFlow or torch loads too: Keras builds the same model.
"""

import os
import sys

from curvax.adapters.frameworks import import_framework

if "keras" not in sys.modules:
    # Keras reads it when it is imported, and can never change it.
    os.environ.setdefault("KERAS_BACKEND", "jax")
import_framework("keras", "keras")

from curvax.adapters.keras.model import from_model  # noqa: E402

__all__ = ["from_model"]
