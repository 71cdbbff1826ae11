"""Choice between an operation's compiled kernel and its plain JAX form."""

from __future__ import annotations

from curvax import _native
from curvax.checks import check_choice

__all__ = ["resolve"]


def resolve(impl: str, kernel: str) -> str:
    """Returns ``"ffi"`` or ``"reference"`` for the ``impl`` argument of an operation.

    ``"auto"`` takes `kernel` where it is installed for JAX's default device, and
    ``CURVAX_IMPL=reference`` is not set. A named implementation is never replaced by another.

    Raises:
        TypeError: ``impl`` is not a string.
        ValueError: ``impl`` is not a known word.
        RuntimeError: ``impl="ffi"`` and the compiled kernel is not installed.
    """
    check_choice("impl", impl, ("auto", "ffi", "reference"))
    if impl == "auto":
        return "ffi" if _native.use_native(kernel) else "reference"
    if impl == "ffi" and not _native.available(kernel):
        platform = _native.platform()
        remedies = {"cpu": "reinstall curvax without CURVAX_NO_NATIVE"}
        if kernel not in _native.CPU_ONLY:
            remedies["cuda"] = _native.CUDA_REMEDY
        remedy = remedies.get(platform, "none exists for this platform")
        raise RuntimeError(
            f"impl='ffi' needs curvax's compiled kernel {kernel!r} for {platform}, which "
            f"is not installed; {remedy}, or use impl='reference'"
        )
    return impl
