"""Curvature of neural-network losses in JAX: certified eigenpairs of matrix-free operators."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvax import losses
    from curvax.filters import match_names, match_regex
    from curvax.krylov.eigsh import eigsh
    from curvax.krylov.plan import Plan, plan
    from curvax.operators.algebra import identity
    from curvax.operators.base import Operator, VectorSpace
    from curvax.operators.ggn import ggn
    from curvax.operators.hessian import hessian
    from curvax.operators.matrix import from_matvec
    from curvax.results import ConvergenceWarning, EigenResult, Matvecs, Progress

__all__ = [
    "ConvergenceWarning",
    "EigenResult",
    "Matvecs",
    "Operator",
    "Plan",
    "Progress",
    "VectorSpace",
    "eigsh",
    "from_matvec",
    "ggn",
    "hessian",
    "identity",
    "losses",
    "match_names",
    "match_regex",
    "plan",
]

_MODULES = {
    "curvax.filters": ("match_names", "match_regex"),
    "curvax.krylov.eigsh": ("eigsh",),
    "curvax.krylov.plan": ("Plan", "plan"),
    "curvax.operators.algebra": ("identity",),
    "curvax.operators.base": ("Operator", "VectorSpace"),
    "curvax.operators.ggn": ("ggn",),
    "curvax.operators.hessian": ("hessian",),
    "curvax.operators.matrix": ("from_matvec",),
    "curvax.results": ("ConvergenceWarning", "EigenResult", "Matvecs", "Progress"),
}


def __getattr__(name: str) -> Any:
    # JAX is imported at the first use: the command line must answer Ctrl-C before that.
    if name == "losses":
        return importlib.import_module("curvax.losses")
    for module, names in _MODULES.items():
        if name in names:
            return globals().setdefault(name, getattr(importlib.import_module(module), name))
    raise AttributeError(f"module 'curvax' has no attribute {name!r}")
