"""The compiled kernel, through XLA's foreign-function interface."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import Array

from curvax.ops.manual_axes import vary, varying


def matmul_sum(
    terms: Sequence[tuple[Array, Array]], add_to: Array | None, transpose_a: bool, transpose_b: bool
) -> Array:
    """The sum, in place of `add_to`."""
    operands = [x for term in terms for x in term]
    a, b = terms[0]
    batch = next((x.shape[:1] for x in operands if x.ndim == 3), ())
    shape = (*batch, a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1])
    aliases = {}
    if add_to is not None:
        aliases = {len(operands): 0}
        operands.append(add_to)
    call = jax.ffi.ffi_call(
        "curvax.matmul_sum",
        jax.ShapeDtypeStruct(shape, a.dtype),
        vmap_method="sequential",
        input_output_aliases=aliases,
    )
    out = call(*operands, transpose_a=transpose_a, transpose_b=transpose_b)
    return vary(out, varying(*operands))
