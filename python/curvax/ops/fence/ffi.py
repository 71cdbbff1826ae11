"""The fence as a primitive: the identity, and on a CPU a call that XLA does not look into."""

import jax

from curvax.jax_internals import Primitive, ad, batching, mlir

FENCE = Primitive("curvax_fence")


def _define_fence() -> None:
    """The rules of the identity; on a CPU alone it is a call."""
    FENCE.def_impl(lambda x: x)
    FENCE.def_abstract_eval(lambda aval: aval)
    mlir.register_lowering(FENCE, lambda context, x: [x])
    call = jax.ffi.ffi_lowering("curvax.fence", operand_output_aliases={0: 0})
    mlir.register_lowering(FENCE, call, platform="cpu")
    # What is differentiated or transposed has products to feed, too.
    ad.deflinear2(FENCE, lambda cotangent, x: [FENCE.bind(cotangent)])
    batching.defvectorized(FENCE)


_define_fence()
