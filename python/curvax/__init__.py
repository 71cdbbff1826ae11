"""Curvature of neural-network losses in JAX: certified eigenpairs of matrix-free operators."""

from curvax.filters import match_names, match_regex
from curvax.krylov.eigsh import eigsh
from curvax.operators.hessian import hessian
from curvax.operators.matrix import from_matvec
from curvax.results import ConvergenceWarning, EigenResult, Matvecs, Progress

__all__ = [
    "ConvergenceWarning",
    "EigenResult",
    "Matvecs",
    "Progress",
    "eigsh",
    "from_matvec",
    "hessian",
    "match_names",
    "match_regex",
]
