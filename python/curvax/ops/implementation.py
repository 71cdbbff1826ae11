"""Choice between an operation's compiled kernel and its plain JAX form."""

from __future__ import annotations

import jax

from curvax import _native

__all__ = ["resolve"]


def resolve(op: str, impl: str) -> str:
    """Returns ``"ffi"`` or ``"reference"`` for the ``impl`` argument of operation ``op``.

    ``"auto"`` takes the kernel where it is installed, the default backend is a CPU, and
    ``CURVAX_IMPL=reference`` is not set. A named implementation is never replaced by another.

    Raises:
        ValueError: ``impl`` is not a known word.
        RuntimeError: ``impl="ffi"`` and the compiled kernels are not installed.
    """
    if impl not in ("auto", "ffi", "reference"):
        raise ValueError(f"`{op}(impl=...)` must be 'auto', 'ffi' or 'reference', got {impl!r}")
    if impl == "auto":
        return "ffi" if _native.use_native() and jax.default_backend() == "cpu" else "reference"
    if impl == "ffi" and not _native.available():
        raise RuntimeError(
            f"`{op}(impl='ffi')` needs curvax's compiled kernels, which are not installed; "
            "reinstall curvax without CURVAX_NO_NATIVE, or use impl='reference'"
        )
    return impl
