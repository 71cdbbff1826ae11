"""What computations return: values with their certificates."""

from curvax.results.blocks import BlockResults
from curvax.results.density import DensityProgress, SpectralDensity
from curvax.results.eigen import (
    EigenResult,
    Progress,
    numbered,
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
    "DensityProgress",
    "DiagonalResult",
    "EigenResult",
    "LanczosTridiagonal",
    "Progress",
    "SolveResult",
    "SpectralDensity",
    "TraceProgress",
    "TraceResult",
    "load",
    "numbered",
]
