"""The command `curvax`: `demo`, `info`, `--version` (the extra `cli`).

Results go to stdout, progress and messages to stderr. JAX is imported by the commands that need
it, not by this module.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    raise SystemExit("the command line needs an extra: pip install 'curvax[cli]'") from None

from curvax.display import open_stdout, print_facts, show_progress
from curvax.krylov.interrupt import InterruptFlag

if TYPE_CHECKING:
    from curvax.results import EigenResult

_NOT_CONVERGED = 3
_BAD_INPUT = 2
_INTERRUPTED = 130

_Certify = Literal["residuals", "complete"]

_COMPLETE = {
    None: "not checked (--certify complete searches for missed ones)",
    True: "searched: none was left to find",
    False: "searched until the products ran out: some may be missing",
}


app = typer.Typer(
    name="curvax",
    help="Curvature of neural-network losses: certified top eigenpairs of Hessians.",
    no_args_is_help=True,
    # Plain help: the decorated one gives every flag a type.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"curvax {importlib.metadata.version('curvax')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Curvature of neural-network losses: certified top eigenpairs of Hessians."""


def _check_tol(value: float) -> float:
    if not (math.isfinite(value) and 0 < value < 1):
        raise typer.BadParameter(f"expected a number between 0 and 1, got {value:g}")
    return value


def _check_size(high: int, low: int, max_matvecs: int | None) -> None:
    """Refuse what the shipped model cannot give, before it is loaded."""
    from curvax.plan import available_bytes

    both, k = "--high, --low", high + low
    facts = importlib.resources.files("curvax").joinpath("demo", "gpt.json").read_text()
    n = json.loads(facts)["parameters"]
    if not 1 <= k <= n:
        message = f"ask for 1 to {n} eigenvalues in all, got {high} + {low} = {k}"
        raise typer.BadParameter(message, param_hint=both)
    if max_matvecs is not None and max_matvecs < k:
        message = f"{k} eigenvalues need at least as many products, got {max_matvecs}"
        raise typer.BadParameter(f"{message}; raise it or lower {both}", param_hint="--max-matvecs")
    # The basis and the result, in float32.
    needed, free = 2 * k * n * 4, available_bytes()
    if needed > free:
        message = f"{k} eigenvalues take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        raise typer.BadParameter(f"{message}; ask for fewer", param_hint=both)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        obstacle = None if os.access(path, os.W_OK) else "not writable"
    except OSError as error:
        obstacle = error.strerror
    if obstacle:
        message = f"expected a directory to write to, got {str(path)!r} ({obstacle})"
        raise typer.BadParameter(f"{message}; choose another", param_hint="--out")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the files go; made if need be.")
    ] = Path("curvax-demo"),
    high: Annotated[
        int, typer.Option(min=0, metavar="N", help="Eigenvalues from the high end.")
    ] = 10,
    low: Annotated[int, typer.Option(min=0, metavar="N", help="Eigenvalues from the low end.")] = 5,
    tol: Annotated[
        float,
        typer.Option(
            callback=_check_tol,
            metavar="X",
            help="Largest residual allowed, relative to the largest absolute eigenvalue; "
            "between 0 and 1.",
        ),
    ] = 1e-3,
    max_matvecs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop the solve after this many products."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the starting vector.")] = 0,
    certify: Annotated[
        _Certify,
        typer.Option(help="Prove residuals only, or also search for missed eigenvalues."),
    ] = "residuals",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Analyse a small trained GPT: its Hessian's outermost eigenvalues.

    Writes spectrum.npz, spectrum.json and spectrum.png into DIR. The exit status is 0 if every
    eigenpair converged, 3 if not, 2 for bad input and 130 after Ctrl-C, which keeps what the solve
    knows.
    """
    _check_size(high, low, max_matvecs)
    _make_directory(out)
    console = open_stdout(quiet)
    try:
        result = _analyse(console, (high, low), tol, max_matvecs, seed, certify, quiet)
        with InterruptFlag() as late:
            _print_result(console, result, (high, low))
            _write_files(console, result, out)
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)
    except MemoryError:
        _fail(f"too little memory for {high + low} eigenvalues: lower --high, --low", _BAD_INPUT)
    except (ValueError, ImportError) as error:
        _fail(str(error), _BAD_INPUT)
    if result.interrupted or late:
        raise typer.Exit(_INTERRUPTED)
    raise typer.Exit(0 if result.all_converged else _NOT_CONVERGED)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(f"error: {message}")
    raise typer.Exit(status)


def _analyse(
    console: Console,
    k: tuple[int, int],
    tol: float,
    max_matvecs: int | None,
    seed: int,
    certify: _Certify,
    quiet: bool,
) -> EigenResult:
    with show_progress(quiet, "loading JAX and the model; compiling its loss"):
        import jax

        import curvax as cx
        from curvax.demo import gpt, load

        params, batch = load()
        op = cx.hessian(gpt.loss, params, batch)

    sequences, length = batch.shape
    leaves = len(jax.tree.leaves(params))
    rows = {
        "model": f"trained byte-level GPT, {op.shape[0]:,} parameters in {leaves} arrays",
        "batch": f"{sequences} sequences, {sequences * (length - 1):,} predicted bytes",
        "loss": f"{float(op.loss):.4f} nats/byte",
        "device": _device(),
        "kernels": _kernels(),
        "wanted": f"{k[0]} highest and {k[1]} lowest eigenvalues of the Hessian, tol {tol:g}",
    }
    print_facts(console, rows)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        phase, budgeted = "compiling the Hessian-vector product", max_matvecs is not None
        with show_progress(quiet, phase, budgeted) as display:
            result = cx.eigsh(
                op,
                k,
                which="BE",
                tol=tol,
                seed=seed,
                max_matvecs=max_matvecs,
                certify=certify,
                callback=display.update,
            )
    # What a ConvergenceWarning says stands below the table.
    notes = [w.message for w in caught if not issubclass(w.category, cx.ConvergenceWarning)]
    for note in dict.fromkeys(map(str, notes)):
        console.print(f"note: {note}", style="yellow")
    return result


def _print_result(console: Console, result: EigenResult, k: tuple[int, int]) -> None:
    marks = ("✓", "✗") if console.encoding.lower().startswith("utf") else ("yes", "NO")
    table = Table()
    for name in ("index", "eigenvalue", "residual", "bound", "converged"):
        table.add_column(name, justify="center" if name == "converged" else "right")
    columns = (result.eigenvalues, result.residuals, result.bounds, result.converged)
    for i, (value, residual, bound, converged) in enumerate(zip(*columns, strict=True)):
        table.add_row(
            _index(i, len(result.eigenvalues), k),
            f"{value:.5f}",
            _measured(residual),
            _measured(bound),
            marks[0] if converged else marks[1],
            style=None if converged else "red",
            end_section=i == k[0] - 1,
        )
    console.print(table)
    print_facts(console, _facts(result))
    console.print(_verdict(result, sum(k)), style="green" if result.all_converged else "bold red")


def _index(i: int, found: int, k: tuple[int, int]) -> str:
    """From 1 at the high end, from -1 at the low end, as Python counts in a list."""
    if found < sum(k):
        return "?"  # interrupted so early that it is not known which these are
    return str(i + 1 if i < k[0] else i - found)


def _measured(residual: float) -> str:
    return f"{residual:.2e}" if math.isfinite(residual) else "-"


def _facts(result: EigenResult) -> dict[str, str]:
    products, seconds = result.num_matvecs, dict(result.seconds)
    total = seconds.pop("total")
    parts = ", ".join(f"{part} {spent:.2f}" for part, spent in seconds.items())
    return {
        "tol_effective": f"{result.tol_effective:.2e} of max |eigenvalue|",
        "noise": f"{result.noise:.1e} of max |eigenvalue|",
        "orthogonality": f"{result.orthogonality:.1e}",
        "complete": _COMPLETE[result.complete],
        "products": f"{products.solve} solve + {products.verification} verification",
        "restarts": str(result.num_restarts),
        "seconds": f"{total:.2f} in all: {parts}",
    }


def _verdict(result: EigenResult, wanted: int) -> str:
    k, done = len(result.converged), int(result.converged.sum())
    if result.interrupted:
        # An early interrupt finds fewer pairs than were asked for.
        return f"interrupted: {done} of the {wanted} wanted eigenpairs converged"
    if result.all_converged:
        return f"all {k} eigenpairs converged"
    return (
        f"not converged: {k - done} of {k} eigenpairs, after {result.num_matvecs.solve} products; "
        "raise --max-matvecs or --tol"
    )


def _write_files(console: Console, result: EigenResult, out: Path) -> None:
    written = list(result.save(out / "spectrum"))
    try:
        from curvax.plot import plot_spectrum

        picture = out / "spectrum.png"
        plot_spectrum(result, picture, title="Hessian of the demo GPT: outermost eigenvalues")
        written.append(picture)
    except ImportError as error:
        console.print(f"note: no picture: {error}", style="yellow")
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


@app.command()
def info() -> None:
    """Show versions, devices and the compiled kernels."""
    try:
        print_facts(open_stdout(), dict(_info()))
    except (ValueError, ImportError) as error:
        _fail(str(error), _BAD_INPUT)


def _info() -> Iterable[tuple[str, str]]:
    import jax

    from curvax import _native
    from curvax.operators.fences import fence

    build = _native.build_info()
    yield "curvax", importlib.metadata.version("curvax")
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "jax", f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"
    yield "devices", ", ".join(str(device) for device in jax.devices())
    yield "kernels", _kernels()
    if build:
        yield "FFI API", f"0.{build['ffi_api_minor']}"
        yield "levels", f"{', '.join(build['compiled_levels'])}; in use: {build['active_level']}"
        # GCC gives its number alone, other compilers their name too.
        name = "GCC " if build["compiler"][0].isdigit() else ""
        yield "compiler", name + build["compiler"]

    def probe(x: Any) -> Any:
        return x

    yield "fence", "active" if fence(probe) is not probe else "not active"
    for variable in ("CURVAX_IMPL", "CURVAX_ISA"):
        if os.environ.get(variable):
            yield variable, os.environ[variable]


def _device() -> str:
    import jax

    device = jax.devices()[0]
    cores = f" ({len(os.sched_getaffinity(0))} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, JAX {jax.__version__}"


def _kernels() -> str:
    from curvax import _native

    if not _native.available():
        return "not compiled in: plain JAX instead, slower"
    build = _native.build_info()
    names = ", ".join(name.removeprefix("curvax.") for name in build["kernels"])
    if not _native.use_native():
        return f"switched off by CURVAX_IMPL ({names})"
    return f"compiled, level {build['active_level']} ({names})"
