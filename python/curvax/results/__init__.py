"""What computations return: values with their certificates."""

from curvax.results.blocks import BlockResults
from curvax.results.density import SpectralDensity
from curvax.results.eigen import (
    BoolArray,
    ConvergenceWarning,
    EigenResult,
    FloatArray,
    Matvecs,
    Progress,
    warn,
    warn_unconverged,
)
from curvax.results.estimates import (
    DiagonalResult,
    LanczosTridiagonal,
    TraceProgress,
    TraceResult,
)
from curvax.results.solution import SolveResult
from curvax.results.stored import load

__all__ = [
    "BlockResults",
    "BoolArray",
    "ConvergenceWarning",
    "DiagonalResult",
    "EigenResult",
    "FloatArray",
    "LanczosTridiagonal",
    "Matvecs",
    "Progress",
    "SolveResult",
    "SpectralDensity",
    "TraceProgress",
    "TraceResult",
    "load",
    "warn",
    "warn_unconverged",
]
