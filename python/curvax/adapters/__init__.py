"""Models of other frameworks, and parameter files, as a `curvax.Model`.

`torch`, `huggingface`, `keras`, `flax`, `equinox` and `files`. Each imports its framework, and each
adapter is imported, at its first use. What they make is an `AdaptedModel`; its `verify` returns a
`Verification`, or raises a `VerificationError`.
"""

from typing import TYPE_CHECKING

from curvax import lazy

# For type checkers, which read no tables; a test compares the two.
if TYPE_CHECKING:
    from curvax.adapters import equinox as equinox
    from curvax.adapters import files as files
    from curvax.adapters import flax as flax
    from curvax.adapters import huggingface as huggingface
    from curvax.adapters import keras as keras
    from curvax.adapters import torch as torch
    from curvax.adapters.adapted import AdaptedModel as AdaptedModel
    from curvax.adapters.verification import Verification as Verification
    from curvax.adapters.verification import VerificationError as VerificationError

_HOMES = {
    "AdaptedModel": "curvax.adapters.adapted",
    "Verification": "curvax.adapters.verification",
    "VerificationError": "curvax.adapters.verification",
    "equinox": "curvax.adapters.equinox",
    "files": "curvax.adapters.files",
    "flax": "curvax.adapters.flax",
    "huggingface": "curvax.adapters.huggingface",
    "keras": "curvax.adapters.keras",
    "torch": "curvax.adapters.torch",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazy.attach(__name__, _HOMES)
