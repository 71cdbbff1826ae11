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

from curvax import _native
from curvax.jax_internals import (
    CONTROL_FLOW,
    MOVES,
    PRODUCTS,
    REARRANGEMENTS,
    Atom,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    body,
    called,
    warn_unrecognised,
)
from curvax.jaxprs import Rewriter, rewritten
from curvax.ops.fence.convolutions import in_fast_order
from curvax.ops.fence.ffi import FENCE
from curvax.ops.fence.transposes import without_transposes
from curvax.typing import DTypeLike, PyTree

# A fence costs a custom call, some microseconds: below this size recomputing is cheaper.
_MIN_ELEMENTS = 4096

# Computed once whatever reads them: XLA:CPU does not fuse these into their consumers.
_MATERIALISED = PRODUCTS | CONTROL_FLOW | MOVES | {FENCE.name}


def fence(fun: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return `fun` with fences before its matrix products where they help.

    Args:
        fun: a traceable function of pytrees, already differentiated and batched.

    Returns:
        A function with the same values; `fun` itself where the fence is unavailable (no compiled
        module, `CURVAX_IMPL=reference`, or a backend other than the CPU).
    """
    if not _native.use_native("fence"):
        return fun
    warn_unrecognised()
    return rewritten(fun, _Fencer)


@functools.lru_cache(maxsize=256)
def _fence_equation(shape: tuple[int, ...], dtype: DTypeLike) -> JaxprEqn:
    return jax.make_jaxpr(FENCE.bind)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr.eqns[0]


class _Fencer(Rewriter):
    def enters(self, eqn: JaxprEqn) -> bool:
        return called(eqn) is not None or eqn.primitive.name in CONTROL_FLOW

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        jaxpr = in_fast_order(without_transposes(jaxpr))
        wanted = _values_to_fence(jaxpr)
        fenced: dict[Var, Var] = {}

        def current(atoms: Sequence[Atom]) -> list[Atom]:
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
    """The value whose rearrangement `var` is, which XLA folds into the reading of an operand."""
    while var in producer and producer[var].primitive.name in REARRANGEMENTS:
        operand = producer[var].invars[0]
        if isinstance(operand, Literal):
            return var
        var = operand
    return var


def _operands_of_products(jaxpr: Jaxpr) -> list[Var]:
    """The variables of `jaxpr` that a product reads, here or inside an inlined call."""
    operands: list[Var] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            read: Sequence[Atom] = eqn.invars
        elif (call := called(eqn)) is not None:
            inner, outer = body(call[0]), call[1]
            producer = {var: e for e in inner.eqns for var in e.outvars}
            sources = {_behind_rearrangements(v, producer) for v in _operands_of_products(inner)}
            pairs = zip(outer, inner.invars, strict=True)
            # XLA inlines the call, so a value crosses its border on the way to a product.
            read = [atom for atom, var in pairs if var in sources]
        else:
            continue
        operands.extend(v for v in read if not isinstance(v, Literal))
    return operands
