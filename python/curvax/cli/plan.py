"""`curvax plan`."""

from __future__ import annotations

from curvax.cli.display import show_progress
from curvax.cli.exits import Status
from curvax.cli.options import Count, Limit, Tol, Which
from curvax.cli.session import Session, command


@command(writes=False)
def plan(
    session: Session,
    count: Count = 5,
    which: Which = "LM",
    tol: Tol = 1e-3,
    limit: Limit = None,
) -> Status:
    """Forecast the memory and the products of a spectrum.

    Makes no product. The exit status is 0 if the solve would fit, 2 if not or for bad input, and
    130 after Ctrl-C.
    """
    import curvax as cx

    op = session.load()
    with show_progress(session.quiet, "compiling the matrix-vector product"):
        found = cx.plan(op, count, which=which, tol=tol, limit=limit)
    session.console.print(str(found))
    return Status.DONE if found.fits else Status.BAD_INPUT
