"""The arguments of `eigsh`, checked, with every default decided."""

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from curvax.krylov.arguments import check_arguments
from curvax.krylov.plan import Plan, choose, remedy
from curvax.krylov.selection import Wanted
from curvax.krylov.sizes import matvec_limit
from curvax.memory import host_bytes, memory_of, on_device, readable
from curvax.operators.base import Operator
from curvax.program import Clock
from curvax.results import Progress


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that steers a solve."""

    plan: Plan
    wanted: Wanted
    tol: float
    relative_to: str
    seed: int
    block: int
    rows: int
    dense: bool
    max_matvecs: int
    basis_dtype: np.dtype[Any]
    certify: str
    callback: Callable[[Progress], Any] | None
    return_eigenvectors: bool


def settle(op: Operator, k: Any, which: Any, options: dict[str, Any], clock: Clock) -> Settings:
    """Check the arguments of `eigsh`, and plan; see there for what they mean and what is raised."""
    request = check_arguments(op, k, which, options)
    plan = choose(op, request, clock)
    if not plan.fits:
        raise MemoryError(
            f"the solve needs {readable(plan.bytes.peak)}, but {readable(plan.limit)} are free: "
            f"{remedy(op, plan, memory_of(op))}. The forecast:\n{plan}"
        )
    # Beside a device the forecast's limit does not count them.
    if on_device(op) and plan.bytes.host > host_bytes():
        raise MemoryError(
            f"the small matrices of the solve need {readable(plan.bytes.host)} on the host, but "
            f"{readable(host_bytes())} are free there: lower max_basis ({plan.max_basis}). The "
            f"forecast:\n{plan}"
        )
    return Settings(
        plan=plan,
        wanted=request.wanted,
        tol=request.tol,
        relative_to=request.relative_to,
        seed=secrets.randbits(32) if request.seed is None else request.seed,
        block=plan.block_size,
        rows=plan.max_basis,
        dense=plan.dense,
        max_matvecs=matvec_limit(request.max_matvecs, plan.k, plan.block_size, plan.n),
        basis_dtype=plan.basis_dtype,
        certify=request.certify,
        callback=request.callback,
        return_eigenvectors=request.return_eigenvectors,
    )
