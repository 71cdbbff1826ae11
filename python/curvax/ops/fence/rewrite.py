"""The fence: stop XLA:CPU from recomputing elementwise chains inside matrix products.

XLA:CPU fuses the producers of a `dot` operand into the loop that packs that operand. In a
backward pass the producer is a running sum of cotangents, so the weight gradient of each layer
may recompute the sums of all later layers: cost and compile time then grow with the square of
the depth. `lax.optimization_barrier` is expanded before fusion and does not help. A custom call
does: it is opaque, and with its result aliased to its operand it moves no byte.

The rewrite runs on the jaxpr of a product, already differentiated and batched; who differentiates
or batches the product itself meets the fence as a primitive, with the rules of the identity. The
numbers are those of the unfenced program up to XLA's re-association.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvax import _native
from curvax.jaxprs import Rewriter, rewritten
from curvax.ops.fence.ffi import FENCE

# A fence costs a custom call, some microseconds: below this size recomputing is cheaper.
_MIN_ELEMENTS = 4096

_PRODUCTS = {"dot_general", "conv_general_dilated"}

# XLA inlines these, so a value crosses their border on its way to a product.
_INLINED = {
    "jit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
}

_CONTROL_FLOW = {"scan", "while", "cond"}

# Computed once whatever reads them: XLA:CPU does not fuse these into their consumers.
_MATERIALISED = _PRODUCTS | _CONTROL_FLOW
_MATERIALISED |= {"ffi_call", FENCE.name, "gather", "scatter", "scatter-add", "sort"}

# XLA folds these into the reading of a product's operand: the value behind them is what counts.
_REARRANGEMENTS = {
    "transpose",
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "slice",
    "rev",
    "copy",
    "convert_element_type",
}


def fence(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fun` with fences before its matrix products where they help.

    Args:
        fun: a traceable function of pytrees, already differentiated and batched.

    Returns:
        A function with the same values; `fun` itself where the fence is unavailable (no compiled
        module, `CURVAX_IMPL=reference`, or a backend other than the CPU).
    """
    if not _native.use_native("fence"):
        return fun
    return rewritten(fun, _Fencer)


@functools.lru_cache(maxsize=256)
def _fence_equation(shape: tuple[int, ...], dtype: Any) -> JaxprEqn:
    return jax.make_jaxpr(FENCE.bind)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr.eqns[0]


class _Fencer(Rewriter):
    def enters(self, eqn: JaxprEqn) -> bool:
        return eqn.primitive.name in _INLINED | _CONTROL_FLOW

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        wanted = _values_to_fence(jaxpr)
        fenced: dict[Var, Var] = {}

        def current(atoms: Sequence[Any]) -> list[Any]:
            return [a if isinstance(a, Literal) else fenced.get(a, a) for a in atoms]

        equations = []
        for eqn in jaxpr.eqns:
            equations.append(eqn.replace(invars=current(eqn.invars), params=self.params(eqn)))
            for var in eqn.outvars:
                if var in wanted:
                    aval: Any = var.aval
                    fenced[var] = Var(aval)
                    template = _fence_equation(aval.shape, aval.dtype)
                    equations.append(template.replace(invars=[var], outvars=[fenced[var]]))
        return jaxpr.replace(eqns=equations, outvars=current(jaxpr.outvars))


def _values_to_fence(jaxpr: Jaxpr) -> set[Var]:
    """The large float values, computed in `jaxpr` by fusible operations, that a product reads."""
    producer = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    wanted = set()
    for var in _operands_of_products(jaxpr):
        source = _behind_rearrangements(var, producer)
        if source not in producer or producer[source].primitive.name in _MATERIALISED:
            continue
        aval: Any = source.aval
        if jnp.issubdtype(aval.dtype, jnp.floating) and aval.size >= _MIN_ELEMENTS:
            wanted.add(source)
    return wanted


def _behind_rearrangements(var: Var, producer: dict[Var, JaxprEqn]) -> Var:
    while var in producer and producer[var].primitive.name in _REARRANGEMENTS:
        operand = producer[var].invars[0]
        if isinstance(operand, Literal):
            return var
        var = operand
    return var


def _operands_of_products(jaxpr: Jaxpr) -> list[Var]:
    """The variables of `jaxpr` that a product reads, here or inside an inlined call."""
    operands: list[Var] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PRODUCTS:
            read: Sequence[Any] = eqn.invars
        elif eqn.primitive.name in _INLINED:
            inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            producer = {var: e for e in inner.eqns for var in e.outvars}
            sources = {_behind_rearrangements(v, producer) for v in _operands_of_products(inner)}
            pairs = zip(eqn.invars, inner.invars, strict=True)
            read = [outer for outer, var in pairs if var in sources]
        else:
            continue
        operands.extend(v for v in read if not isinstance(v, Literal))
    return operands
