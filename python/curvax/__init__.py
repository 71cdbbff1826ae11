"""Curvature of neural-network losses in JAX: certified eigenpairs of matrix-free operators."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvax import adapters, compat, losses
    from curvax.estimators.density import spectral_density
    from curvax.estimators.diagonal import diagonal
    from curvax.estimators.log_det import log_det
    from curvax.estimators.trace import trace
    from curvax.filters import match_names, match_regex
    from curvax.krylov.eigsh import eigsh
    from curvax.krylov.lanczos_tridiagonal import lanczos_tridiagonal
    from curvax.krylov.linear_solve import solve
    from curvax.krylov.plan import Plan, plan
    from curvax.krylov.power_iteration import power_iteration
    from curvax.krylov.sharpness import sharpness
    from curvax.operators.base import Blocks, Operator
    from curvax.operators.conversion import from_matvec, identity
    from curvax.operators.fisher import fisher
    from curvax.operators.ggn import ggn
    from curvax.operators.hessian import hessian
    from curvax.operators.model import Model
    from curvax.operators.space import VectorSpace
    from curvax.results import (
        BlockResults,
        DiagonalResult,
        EigenResult,
        LanczosTridiagonal,
        Matvecs,
        Progress,
        SolveResult,
        SpectralDensity,
        TraceProgress,
        TraceResult,
        load,
    )
    from curvax.warnings import ConvergenceWarning, InterruptWarning

__all__ = [
    "BlockResults",
    "Blocks",
    "ConvergenceWarning",
    "DiagonalResult",
    "EigenResult",
    "InterruptWarning",
    "LanczosTridiagonal",
    "Matvecs",
    "Model",
    "Operator",
    "Plan",
    "Progress",
    "SolveResult",
    "SpectralDensity",
    "TraceProgress",
    "TraceResult",
    "VectorSpace",
    "adapters",
    "compat",
    "diagonal",
    "eigsh",
    "fisher",
    "from_matvec",
    "ggn",
    "hessian",
    "identity",
    "lanczos_tridiagonal",
    "load",
    "log_det",
    "losses",
    "match_names",
    "match_regex",
    "plan",
    "power_iteration",
    "sharpness",
    "solve",
    "spectral_density",
    "trace",
]

_MODULES = {
    "curvax.estimators.density": ("spectral_density",),
    "curvax.estimators.diagonal": ("diagonal",),
    "curvax.estimators.log_det": ("log_det",),
    "curvax.krylov.power_iteration": ("power_iteration",),
    "curvax.krylov.sharpness": ("sharpness",),
    "curvax.krylov.linear_solve": ("solve",),
    "curvax.estimators.trace": ("trace",),
    "curvax.krylov.lanczos_tridiagonal": ("lanczos_tridiagonal",),
    "curvax.filters": (
        "match_names",
        "match_regex",
    ),
    "curvax.krylov.eigsh": ("eigsh",),
    "curvax.krylov.plan": (
        "Plan",
        "plan",
    ),
    "curvax.operators.base": (
        "Blocks",
        "Operator",
    ),
    "curvax.operators.fisher": ("fisher",),
    "curvax.operators.ggn": ("ggn",),
    "curvax.operators.hessian": ("hessian",),
    "curvax.operators.conversion": (
        "from_matvec",
        "identity",
    ),
    "curvax.operators.model": ("Model",),
    "curvax.operators.space": ("VectorSpace",),
    "curvax.warnings": (
        "ConvergenceWarning",
        "InterruptWarning",
    ),
    "curvax.results": (
        "BlockResults",
        "DiagonalResult",
        "EigenResult",
        "LanczosTridiagonal",
        "Matvecs",
        "Progress",
        "SolveResult",
        "SpectralDensity",
        "TraceProgress",
        "TraceResult",
        "load",
    ),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # JAX is imported at the first use: the command line must answer Ctrl-C before that.
    if name in ("adapters", "compat", "losses"):
        return importlib.import_module(f"curvax.{name}")
    for module, names in _MODULES.items():
        if name in names:
            return globals().setdefault(name, getattr(importlib.import_module(module), name))
    raise AttributeError(f"module 'curvax' has no attribute {name!r}")
