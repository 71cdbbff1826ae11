"""The command `curvax` (the extra `cli`).

Results go to stdout, progress and messages to stderr. JAX is imported by the commands that need
it, not by these modules.
"""

try:
    import rich.console  # noqa: F401
    import typer  # noqa: F401
except ImportError:
    raise SystemExit("the command line needs an extra: pip install 'curvax[cli]'") from None

from curvax.cli import spectrum, plan, estimates, info  # noqa: F401, I001 (in this order, each adds its commands)
from curvax.cli.app import app

__all__ = ["app"]
