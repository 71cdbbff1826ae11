"""Large arrays that are filled bit by bit, with no pass over memory but those that write the parts.

On a CPU alone, where XLA would fill a vector with zeros before others are put into it, writes with
one thread, and takes memory by small pages.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int32, Shaped

from curvax import _native
from curvax.jax_internals import Primitive, ad, batching, mlir
from curvax.typing import DTypeLike

_LIKE, _PUT = Primitive("curvax_uninitialised_like"), Primitive("curvax_put")


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[Array, "..."]:
    """An array of zeros, to be kept and written to: a large one lies on huge pages.

    Args:
        shape: its shape.
        dtype: its dtype.
    """
    if not _native.use_native("zeros"):
        return jnp.zeros(shape, dtype)
    filled: Array = jax.ffi.ffi_call("curvax.zeros", jax.ShapeDtypeStruct(shape, dtype))()
    return filled


def uninitialised_like(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """An array of the shape and dtype of `x`, with any numbers in it, or with zeros.

    Args:
        x: is not read; where it is one of several, by `jax.vmap`, so is the result.
    """
    result: Array = _LIKE.bind(x) if _native.use_native("uninitialised_like") else jnp.zeros_like(x)
    return result


def put(
    out: Shaped[Array, " n"], part: Shaped[Array, " m"], start: Int32[Array, ""]
) -> Shaped[Array, " n"]:
    """The vector `out`, whose memory the result takes over, with the numbers of `part` in it.

    Args:
        out: `(n,)`.
        part: `(m,)`, of the same dtype.
        start: where in `out` it begins, with room for all of it.
    """
    update: Callable[..., Array] = _PUT.bind if _native.use_native("put") else _put
    return update(out, part, start)


def _put(out: Array, part: Array, start: Array) -> Array:
    return lax.dynamic_update_slice(out, part, (start,))


def _define() -> None:
    for primitive, reference in ((_LIKE, jnp.zeros_like), (_PUT, _put)):
        primitive.def_impl(reference)
        primitive.def_abstract_eval(lambda out, *rest: out)
        mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=False))
    like = jax.ffi.ffi_lowering("curvax.uninitialised_like")
    mlir.register_lowering(_LIKE, like, platform="cpu")
    aliased = jax.ffi.ffi_lowering("curvax.put", operand_output_aliases={0: 0})
    mlir.register_lowering(_PUT, aliased, platform="cpu")
    batching.defvectorized(_LIKE)
    batching.primitive_batchers[_PUT] = lambda args, axes: (jax.vmap(_put, axes)(*args), 0)
    # Whatever is there depends on nothing.
    ad.primitive_jvps[_LIKE] = lambda x, _: (_LIKE.bind(*x), jnp.zeros_like(*x))
    ad.primitive_jvps[_PUT] = lambda args, tangents: jax.jvp(
        _put, args, tuple(map(ad.instantiate_zeros, tangents))
    )


_define()
