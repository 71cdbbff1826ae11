"""What computations return: values with their certificates."""

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
    SpectralDensity,
    TraceProgress,
    TraceResult,
)

__all__ = [
    "BoolArray",
    "ConvergenceWarning",
    "DiagonalResult",
    "EigenResult",
    "FloatArray",
    "LanczosTridiagonal",
    "Matvecs",
    "Progress",
    "SpectralDensity",
    "TraceProgress",
    "TraceResult",
    "warn",
    "warn_unconverged",
]
