"""The user's own problem: a function that makes a model and batches, and the operator of them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from curvax.cli.app import BAD_INPUT, fail
from curvax.cli.machine import device, kernels, start_jax

if TYPE_CHECKING:
    from curvax.operators.model import Model

_TARGET = typer.Argument(
    metavar="MODULE:FUNCTION",
    help="A function without arguments that returns (model, batches), in an importable module or a "
    "file: my_module:make_problem, problems/mine.py:make_problem.",
)
Target = Annotated[str, _TARGET]
OptionalTarget = Annotated[str | None, _TARGET]
OperatorName = Annotated[
    Literal["hessian", "ggn", "fisher"],
    typer.Option(help="The Hessian, the Gauss-Newton matrix or the Fisher matrix."),
]
Kind = Annotated[
    Literal["empirical", "exact", "mc"] | None,
    typer.Option(help="Which Fisher matrix (with --operator fisher; empirical if not set)."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Only parameters whose name matches, as 'blocks.*.attn.*'; may be given repeatedly.",
    ),
]
Microbatch = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Samples per microbatch, to bound the memory."),
]

NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "fisher": "Fisher matrix"}


def load_problem(target: str) -> tuple[Model, Any]:
    """What the function named by `target` returns, or a refusal."""
    module_name, colon, name = target.rpartition(":")
    if not (colon and module_name and name.isidentifier()):
        _refuse(f"expected MODULE:FUNCTION, as my_module:make_problem, got {target!r}")
    try:
        module = _import(module_name)
        function: Any = getattr(module, name, None)
        if not callable(function):
            own = [
                key
                for key, value in vars(module).items()
                if callable(value) and getattr(value, "__module__", "") == module.__name__
            ]
            _refuse(f"{module_name!r} has no function {name!r}; it has {', '.join(own) or 'none'}")
        problem = function()
    except (KeyboardInterrupt, typer.BadParameter):
        raise
    except Exception as error:
        # The user's own code: only its traceback tells where.
        traceback.print_exc()
        fail(f"{target} raised {type(error).__name__}: {error}", BAD_INPUT)
    return _checked(target, problem)


def _import(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            _refuse(f"no such file: {name!r}")
        sys.path.insert(0, str(path.parent.resolve()))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module is there, and lacks something itself
        _refuse(
            f"no module {name!r} here or among the installed ones; a file is named with its .py"
        )


def _checked(target: str, problem: Any) -> tuple[Model, Any]:
    from curvax.operators.foreign import adapter_of
    from curvax.operators.model import Model

    if not (isinstance(problem, tuple) and len(problem) == 2 and isinstance(problem[0], Model)):
        got = type(problem).__name__
        if isinstance(problem, tuple):
            got += f" of {', '.join(type(part).__name__ for part in problem)}"
        adapter = adapter_of(problem[0] if isinstance(problem, tuple) and problem else problem)
        remedy = f"; make a model of it by {adapter}" if adapter else ""
        _refuse(
            f"{target} must return (model, batches), with a curvax.Model or what an adapter "
            f"returns, got {got}{remedy}"
        )
    return problem


def _refuse(message: str) -> Any:
    raise typer.BadParameter(message, param_hint="MODULE:FUNCTION")


def make_operator(
    target: str, operator: str, kind: Any, where: list[str] | None, microbatch_size: int | None
) -> Any:
    """The operator of the problem that `target` names."""
    start_jax()
    model, batches = load_problem(target)
    return operator_of(model, batches, operator, kind, where, microbatch_size)


def operator_of(
    model: Model,
    batches: Any,
    operator: str,
    kind: Any,
    where: list[str] | None,
    microbatch_size: int | None,
) -> Any:
    """The operator of a model that the options describe."""
    import curvax as cx

    options: dict[str, Any] = {"microbatch_size": microbatch_size}
    if where:
        options["where"] = cx.match_names(*where)
    if operator != "fisher":
        if kind is not None:
            raise typer.BadParameter("only with --operator fisher", param_hint="--kind")
        return (cx.hessian if operator == "hessian" else cx.ggn)(model, batches, **options)
    if kind == "mc":
        options["seed"] = 0
    return cx.fisher(model, batches, kind=kind or "empirical", **options)


def problem_facts(target: str, op: Any, operator: str) -> dict[str, str]:
    """The first lines of a command's output."""
    return {
        "problem": target,
        "operator": f"{NAMES[operator]} of {op.shape[0]:,} parameters in "
        f"{len(op.space.names)} leaves",
        "loss": f"{float(op.loss):.6g}",
        "device": device(),
        "kernels": kernels(),
    }
