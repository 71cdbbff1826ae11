"""What no scaling of vectors shows: numbers in an operator that are read as zero."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.columns import CHUNK
from curvax.device import programs
from curvax.jax_internals import AnyJaxpr, Literal, body, calls
from curvax.operators.base import Operator
from curvax.operators.checked_product import checked_product
from curvax.operators.conversion import HostOperator
from curvax.operators.curvature import Curvature
from curvax.operators.products import OuterProducts
from curvax.program import Clock, host
from curvax.typing import DTypeLike

Rows = np.ndarray

# Bits of a product that must not depend on what is read as zero.
_BITS = 20

# Bits above the smallest normal number at which a zero operator's numbers are looked at.
_MARGIN = 26


class Probe:
    """Products of an operator with a random vector, times a power of two."""

    def __init__(self, op: Operator, clock: Clock) -> None:
        self.op = op
        self.clock = clock
        like, word = jnp.zeros(1, jnp.int32), np.uint32(1)
        self.vector = programs.random_block(clock, op, like, host(word), host(word))
        self.size = log_norm(np.asarray(self.vector))

    def product(self, exponent: int, op: Operator | None = None) -> Rows:
        """That of `2**exponent` times the vector, by `op` in place of the operator."""
        block = self.vector * jnp.asarray(2.0**exponent, self.op.dtype)
        return np.asarray(programs.multiply(self.clock, op or self.op, block))

    def level(self, exponent: int) -> float:
        """The logarithm of the product's norm, over that of the vector without its factor."""
        return log_norm(self.product(exponent)) - self.size


def log_norm(rows: Rows) -> float:
    """The logarithm to base two of the norm; −∞ of zero, and NaN where it is not finite."""
    wide = rows.astype(np.float64)
    largest = float(np.abs(wide).max())
    if not math.isfinite(largest):
        return math.nan
    if largest == 0:
        return -math.inf
    return math.log2(largest) + math.log2(np.sum((wide / largest) ** 2)) / 2


def check(op: Operator, probe: Probe, exponent: int) -> None:
    """Refuse an operator whose products depend on numbers that are read as zero.

    Args:
        op: the operator.
        probe: of it.
        exponent: at which its products can be computed with, or all are zero.

    Raises:
        FloatingPointError: it does.
    """
    product = probe.product(exponent)
    smallest = _lowest_exponent(op.dtype)
    if log_norm(product) - probe.size - exponent > smallest + 24:
        return
    # Of numbers that are a little larger, products with others may all be read as zero.
    margin = 0 if product.any() else _MARGIN
    raised = _raised(op, margin)
    if raised is not None and _differ(product, probe.product(exponent, raised)):
        _refuse(op)
    for node in jax.tree.leaves(op, is_leaf=lambda x: isinstance(x, (Curvature, HostOperator))):
        if isinstance(node, HostOperator) and _is_flushed(node, exponent):
            _refuse(op)
        if isinstance(node, Curvature) and _is_doubtful(node, exponent):
            _refuse(op)
    if margin and any(_is_small(number, margin) for number in _constants_of(op)):
        _refuse(op)


def _refuse(op: Operator) -> None:
    what = "the loss" if isinstance(op, Curvature) else "A"
    tiny = float(np.finfo(op.dtype).tiny)
    wider = ", or compute in float64" if op.dtype == np.float32 else ""
    raise FloatingPointError(
        f"{what} underflows in {op.dtype}: numbers below {tiny:.3g}, the smallest normal one, are "
        "read as zero, and the products depend on such numbers; multiply "
        f"{what} by a power of two, such as 2**60, and divide the results by it{wider}"
    )


def _lowest_exponent(dtype: DTypeLike) -> int:
    return int(jnp.finfo(dtype).minexp)


def _differ(product: Rows, other: Rows) -> bool:
    change = log_norm(other.astype(np.float64) - product)
    return change > -math.inf and not change < log_norm(product) - _BITS


def _raised(op: Operator, margin: int) -> Operator | None:
    """The operator with the least number above the margin for smaller ones; None without such."""
    leaves, treedef = jax.tree.flatten(op)
    changed = [_raise(leaf, margin) if _is_small(leaf, margin) else leaf for leaf in leaves]
    if all(new is old for new, old in zip(changed, leaves, strict=True)):
        return None
    return jax.tree.unflatten(treedef, changed)


def _small(host: Rows, margin: int) -> Rows:
    """Where numbers are read as zero without being it, or so near to that as the margin."""
    size, tiny = np.abs(host.astype(np.float64)), float(jnp.finfo(host.dtype).tiny)
    # The smallest normal number itself is a usual guard against divisions by zero.
    places: Rows = (size > 0) & (size < tiny * 2.0**margin) & (size != tiny)
    return places


def _is_small(number: object, margin: int) -> bool:
    dtype = getattr(number, "dtype", np.dtype(bool))
    # In float16 such numbers are computed with, in float32.
    if not jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.float16:
        return False
    # Leaves may be as large as the memory allows.
    flat = np.asarray(number).reshape(-1)
    pieces = (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
    return any(bool(_small(piece, margin).any()) for piece in pieces)


def _raise(leaf: Array, margin: int) -> Array:
    flat = np.array(leaf).reshape(-1)
    least = np.asarray(float(jnp.finfo(leaf.dtype).tiny) * 2.0**margin, flat.dtype)
    for i in range(0, flat.size, CHUNK):
        piece = flat[i : i + CHUNK]
        piece[_small(piece, margin)] = least
    return jnp.asarray(flat.reshape(leaf.shape))


def _is_flushed(op: HostOperator, exponent: int) -> bool:
    """Whether the products differ where XLA calls for them, in whose threads it flushes."""
    probe = Probe(op, Clock())
    vector = np.asarray(probe.vector) * op.dtype.type(2.0**exponent)
    return _differ(probe.product(exponent), op.products(vector))


def _is_doubtful(op: Curvature, exponent: int) -> bool:
    """Whether derivatives, on the way to the product, may have been read as zero."""
    if all(isinstance(stack.product, OuterProducts) for stack in op.stacks):
        return False  # its gradients, which are looked at themselves, are multiplied
    smallest = _lowest_exponent(op.dtype)
    level = Probe(op, Clock()).level(exponent) - exponent
    if level > -math.inf:
        return level < smallest + 14
    return 0 < abs(float(op.loss)) < 2.0 ** (smallest + 26)


def _constants_of(op: Operator) -> Iterator[object]:
    """The constants of the programs that a product, and before it the linearisation, run."""
    block = jax.ShapeDtypeStruct((1, op.shape[0]), op.dtype)
    yield from _constants(jax.make_jaxpr(checked_product)(op, block))
    for node in jax.tree.leaves(op, is_leaf=lambda x: isinstance(x, Curvature)):
        for stack in node.stacks if isinstance(node, Curvature) else ():
            batch = jax.tree.map(lambda leaf: leaf[0], stack.batch)
            yield from _constants(jax.make_jaxpr(stack.product.primal)(node.leaves, batch))


def _constants(program: AnyJaxpr) -> Iterator[object]:
    yield from getattr(program, "consts", ())
    for equation in body(program).eqns:
        for atom in equation.invars:
            if isinstance(atom, Literal):
                yield np.asarray(atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
        for inner in calls(equation):
            yield from _constants(inner)
