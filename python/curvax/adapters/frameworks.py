"""Importing a framework, or saying how to install it."""

import importlib
from types import ModuleType


def import_framework(module: str, extra: str) -> ModuleType:
    """The module.

    Args:
        module: such as `"flax.nnx"`.
        extra: of curvax, that installs it.

    Raises:
        ImportError: it is not installed, or what it needs is not; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        first = " (first `pip install torch==2.13.0`)" if extra == "torch" else ""
        raise ImportError(
            f"this adapter needs {module}, which cannot be imported ({error}): "
            f"pip install 'curvax[{extra}]'{first}"
        ) from error
