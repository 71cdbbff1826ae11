"""Models of other frameworks, and parameter files, as a `curvax.Model`.

`torch`, `huggingface`, `keras`, `flax`, `equinox` and `files`. Each imports its framework, and each
adapter is imported, at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvax.adapters import equinox, files, flax, huggingface, keras, torch

__all__ = ["equinox", "files", "flax", "huggingface", "keras", "torch"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"curvax.adapters.{name}")
    raise AttributeError(f"module 'curvax.adapters' has no attribute {name!r}")
