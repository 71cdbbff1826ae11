"""Curvature of neural-network losses in JAX: certified eigenpairs of matrix-free operators."""

import importlib
from typing import TYPE_CHECKING

from curvax import drawing, lazy

# For type checkers, which read no tables; a test compares the two.
if TYPE_CHECKING:
    from curvax import adapters as adapters
    from curvax import compat as compat
    from curvax import losses as losses
    from curvax import nn as nn
    from curvax.estimators.density import spectral_density as spectral_density
    from curvax.estimators.diagonal import diagonal as diagonal
    from curvax.estimators.log_det import log_det as log_det
    from curvax.estimators.trace import trace as trace
    from curvax.filters import match_names as match_names
    from curvax.filters import match_regex as match_regex
    from curvax.heap import keep_memory as keep_memory
    from curvax.krylov.eigsh import eigsh as eigsh
    from curvax.krylov.lanczos_tridiagonal import lanczos_tridiagonal as lanczos_tridiagonal
    from curvax.krylov.linear_solve import solve as solve
    from curvax.krylov.plan import Plan as Plan
    from curvax.krylov.plan import plan as plan
    from curvax.krylov.power_iteration import power_iteration as power_iteration
    from curvax.krylov.sharpness import sharpness as sharpness
    from curvax.operators.base import Blocks as Blocks
    from curvax.operators.base import Operator as Operator
    from curvax.operators.conversion import from_matvec as from_matvec
    from curvax.operators.conversion import identity as identity
    from curvax.operators.failures import KernelFailure as KernelFailure
    from curvax.operators.failures import OutOfMemory as OutOfMemory
    from curvax.operators.fisher import fisher as fisher
    from curvax.operators.ggn import ggn as ggn
    from curvax.operators.hessian import hessian as hessian
    from curvax.operators.model import Model as Model
    from curvax.operators.space import VectorSpace as VectorSpace
    from curvax.results import BlockResults as BlockResults
    from curvax.results import DensityProgress as DensityProgress
    from curvax.results import DiagonalResult as DiagonalResult
    from curvax.results import EigenResult as EigenResult
    from curvax.results import LanczosTridiagonal as LanczosTridiagonal
    from curvax.results import Progress as Progress
    from curvax.results import SolveResult as SolveResult
    from curvax.results import SpectralDensity as SpectralDensity
    from curvax.results import TraceProgress as TraceProgress
    from curvax.results import TraceResult as TraceResult
    from curvax.results import load as load
    from curvax.version import __version__ as __version__
    from curvax.warnings import ConvergenceWarning as ConvergenceWarning
    from curvax.warnings import InterruptWarning as InterruptWarning

# The public names and the modules that they come from.
_HOMES = {
    "BlockResults": "curvax.results",
    "Blocks": "curvax.operators.base",
    "ConvergenceWarning": "curvax.warnings",
    "DensityProgress": "curvax.results",
    "DiagonalResult": "curvax.results",
    "EigenResult": "curvax.results",
    "InterruptWarning": "curvax.warnings",
    "KernelFailure": "curvax.operators.failures",
    "LanczosTridiagonal": "curvax.results",
    "Model": "curvax.operators.model",
    "Operator": "curvax.operators.base",
    "OutOfMemory": "curvax.operators.failures",
    "Plan": "curvax.krylov.plan",
    "Progress": "curvax.results",
    "SolveResult": "curvax.results",
    "SpectralDensity": "curvax.results",
    "TraceProgress": "curvax.results",
    "TraceResult": "curvax.results",
    "VectorSpace": "curvax.operators.space",
    "__version__": "curvax.version",
    "adapters": "curvax.adapters",
    "compat": "curvax.compat",
    "diagonal": "curvax.estimators.diagonal",
    "eigsh": "curvax.krylov.eigsh",
    "fisher": "curvax.operators.fisher",
    "from_matvec": "curvax.operators.conversion",
    "ggn": "curvax.operators.ggn",
    "hessian": "curvax.operators.hessian",
    "identity": "curvax.operators.conversion",
    "keep_memory": "curvax.heap",
    "lanczos_tridiagonal": "curvax.krylov.lanczos_tridiagonal",
    "load": "curvax.results",
    "log_det": "curvax.estimators.log_det",
    "losses": "curvax.losses",
    "match_names": "curvax.filters",
    "match_regex": "curvax.filters",
    "nn": "curvax.nn",
    "plan": "curvax.krylov.plan",
    "power_iteration": "curvax.krylov.power_iteration",
    "sharpness": "curvax.krylov.sharpness",
    "solve": "curvax.krylov.linear_solve",
    "spectral_density": "curvax.estimators.density",
    "trace": "curvax.estimators.trace",
}

__all__ = sorted(_HOMES.keys() - {"__version__"})

# JAX is imported with the first of them: the command line must answer Ctrl-C before that.
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)
drawing.register(lambda: importlib.import_module("curvax.plot").plot)
