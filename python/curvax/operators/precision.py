"""The precision of the products of matrices in a user's loss, which may be an operator's own.

On recent devices XLA computes products of float32 with 11 bits of each entry (TF32) unless it is
told otherwise. In full float32 they take several times as long. Between the two lie products of
parts in bfloat16: `BF16_BF16_F32_X3` adds up three, of the upper and the lower half of 16 bits.

The precision is put into the traced program, already differentiated: every derivative of a product
is a product with the same precision, and what a `custom_jvp` or `custom_vjp` rule computes is there
too. A product with weights has no batch axes, whichever derivative it is: its operands are a weight
and the activations of all tokens, or two arrays of activations of which the sum is over all tokens.
Attention has: samples and heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.lax import DotAlgorithmPreset
from jax.lax import Precision as Level

from curvax.checks import shown
from curvax.jax_internals import (
    KERNELS,
    PRODUCTS,
    RAGGED_PRODUCTS,
    Atom,
    Jaxpr,
    JaxprEqn,
    is_dot,
    unrecognised,
)
from curvax.jaxprs import Rewriter, equations, rewritten
from curvax.losses.linear_ce import LinearSpec
from curvax.program import default_platform
from curvax.typing import PyTree

Precision = Literal["highest", "bf16x3"]

_HIGHEST = (Level.HIGHEST, Level.HIGHEST)
_SPLIT = DotAlgorithmPreset.BF16_BF16_F32_X3
# In float32, as JAX's setting puts them into a program.
_FULL = (
    _HIGHEST,
    Level.HIGHEST,
    "highest",
    "float32",
    DotAlgorithmPreset.F32_F32_F32,
    "F32_F32_F32",
)
_PRODUCTS = PRODUCTS | RAGGED_PRODUCTS


def check_precision(precision: object, method: str = "autodiff") -> None:
    """Refuse a precision that is unknown, or not to be had.

    Raises:
        TypeError: neither a string nor None.
        ValueError: an unknown one; `"bf16x3"` on a CPU, or for finite differences.
    """
    if precision is None:
        return
    known = get_args(Precision)
    if not isinstance(precision, str) or precision not in known:
        error = ValueError if isinstance(precision, str) else TypeError
        listed = ", ".join(map(repr, known))
        raise error(f"precision must be None or one of {listed}, got {shown(precision)}")
    if precision == "highest":
        return
    if method == "finite_difference":
        raise ValueError(
            "precision='bf16x3' is too little for finite differences, which divide the roundings "
            "of gradients by a small step: take precision='highest'"
        )
    if default_platform() == "cpu":
        raise ValueError(
            "precision='bf16x3' must be asked for where JAX's default device has such products; "
            "XLA ignores it on a CPU, which computes in float32: take None or 'highest' there"
        )


def at_precision(fun: Callable[..., PyTree], precision: Precision | None) -> Callable[..., PyTree]:
    """A traceable function with its products in a precision; None leaves them to JAX's setting.

    A product for which the function names a precision itself keeps that.

    Raises:
        NotImplementedError: there may be products that cannot be found.
    """
    if precision is None:
        return fun
    if kinds := unrecognised():
        raise NotImplementedError(
            f"precision={precision!r} cannot be set within {', '.join(kinds)}, which jax "
            f"{jax.__version__} writes in a form unknown to curvax: take precision=None, under "
            "jax.default_matmul_precision"
        )
    set_products = rewritten(fun, lambda: _Setter(precision))

    def wrapped(*args: object) -> PyTree:
        # So that a precision in the program is one that the function names.
        with jax.default_matmul_precision(None):
            return set_products(*args)

    return wrapped


class _Setter(Rewriter):
    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self._split = precision == "bf16x3"

    def enters(self, eqn: JaxprEqn) -> bool:
        return eqn.primitive.name not in KERNELS  # what one computes is its own affair

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        return jaxpr.replace(
            eqns=[eqn.replace(params=self._with_precision(eqn)) for eqn in jaxpr.eqns]
        )

    def _with_precision(self, eqn: JaxprEqn) -> dict[str, Any]:
        spec = eqn.params.get("spec")
        if isinstance(spec, LinearSpec) and spec.precision is None:
            own = _SPLIT if self._split else Level.HIGHEST
            return {**eqn.params, "spec": dataclasses.replace(spec, precision=own)}
        if eqn.primitive.name in _PRODUCTS and eqn.params["precision"] is None:
            split = self._split and _with_weights(eqn)
            return {**eqn.params, "precision": _SPLIT if split else _HIGHEST}
        return self.params(eqn)


def _with_weights(eqn: JaxprEqn) -> bool:
    """Whether a product is one of float32 without batch axes."""
    if not is_dot(eqn):  # algorithms of three parts are for these alone
        return False
    batch, _ = eqn.params["dimension_numbers"][1]
    return not batch and _dtypes(*eqn.invars, *eqn.outvars) == {np.dtype(np.float32)}


def _dtypes(*variables: Atom) -> set[np.dtype]:
    return {variable.aval.dtype for variable in variables}  # type: ignore[attr-defined]


def more_accurate(op: Any) -> str:
    """What would make an operator's products more accurate, as the end of a message; or nothing.

    Args:
        op: an operator, whose product is traced.
    """
    if default_platform() == "cpu":  # where products of float32 are in float32 whatever they say
        return ""
    block = jax.ShapeDtypeStruct((1, op.shape[0]), op.dtype)
    found = {_coarse(eqn) for eqn in equations(jax.make_jaxpr(op.product)(block).jaxpr)} - {None}
    if not found:
        return ""
    return (
        f". Its products of matrices are in the precision {' and '.join(sorted(map(str, found)))}: "
        "precision='highest' of hessian and ggn is full float32, or make the operator under "
        "jax.default_matmul_precision('highest')"
    )


def _coarse(eqn: JaxprEqn) -> str | None:
    """The precision of a product of float32 that is less than that of its operands."""
    spec = eqn.params.get("spec")
    if isinstance(spec, LinearSpec):
        given: Any = spec.precision
    elif eqn.primitive.name in _PRODUCTS:
        given = eqn.params["precision"]
    else:
        return None
    if given in _FULL or np.dtype(np.float32) not in _dtypes(*eqn.invars):
        return None
    if given is None:
        return "DEFAULT"
    return str(given[0] if isinstance(given, tuple) else given).rpartition(".")[2]
