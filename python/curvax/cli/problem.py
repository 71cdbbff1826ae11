"""A problem: a function that makes a model and batches, its parameters, and the operator wanted."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from curvax.cli.exits import Status, fail
from curvax.cli.machine import device, kernels, start_jax

_PACKAGE = Path(__file__).parents[1]
_MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "fisher": "Fisher matrix"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a command is asked about.

    Attributes:
        target: MODULE:FUNCTION, a function that returns a `Model` and batches.
        parameters: its arguments.
        operator: hessian, ggn or fisher.
        kind: of a Fisher matrix.
        where: patterns of parameters' names; all parameters if there are none.
        microbatch_size: samples per microbatch.
    """

    target: str
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    operator: str = "hessian"
    kind: str | None = None
    where: list[str] = dataclasses.field(default_factory=list)
    microbatch_size: int | None = None

    @property
    def matrix(self) -> str:
        """What the operator is called."""
        return _MATRICES[self.operator]

    def load(self) -> tuple[Any, dict[str, str]]:
        """The operator, and the first lines of a command's output; or a refusal."""
        start_jax()
        function = _find(self.target)
        _check_parameters(self.target, function, self.parameters)
        try:
            made = function(**self.parameters)
        except Exception as error:
            _fail_in(self.target, error)
        op = self._operator(*_checked(self.target, made))
        set_here = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        facts = {
            "problem": self.target + (f", {set_here}" if set_here else ""),
            "about": (inspect.getdoc(function) or "").partition("\n")[0],
            "operator": f"{self.matrix} of {op.shape[0]:,} parameters in "
            f"{len(op.space.names)} leaves",
            "loss": f"{float(op.loss):.6g}",
            "device": device(),
            "kernels": kernels(),
        }
        return op, {name: fact for name, fact in facts.items() if fact}

    def _operator(self, model: Any, batches: Any) -> Any:
        import curvax as cx

        options: dict[str, Any] = {"microbatch_size": self.microbatch_size}
        if self.where:
            options["where"] = cx.match_names(*self.where)
        if self.operator != "fisher":
            return (cx.hessian if self.operator == "hessian" else cx.ggn)(model, batches, **options)
        if self.kind == "mc":
            options["seed"] = 0
        return cx.fisher(model, batches, kind=self.kind or "empirical", **options)


def problem_of(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="The problem: a function that returns (model, batches), in an importable module "
            "or a file, as my_module:make_problem, problems/mine.py:make_problem, "
            "curvax.models.gpt:make_problem.",
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An argument of the function, as --set tokens=64; may be given repeatedly.",
        ),
    ] = None,
    model: Annotated[
        Literal["gpt", "llama", "smollm2"] | None,
        typer.Option(help="A shipped model: NAME is short for curvax.models.NAME:make_problem."),
    ] = None,
    operator: Annotated[
        Literal["hessian", "ggn", "fisher"],
        typer.Option(help="The Hessian, the Gauss-Newton matrix or the Fisher matrix."),
    ] = "hessian",
    kind: Annotated[
        Literal["empirical", "exact", "mc"] | None,
        typer.Option(help="Which Fisher matrix (with --operator fisher; empirical if not set)."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only parameters whose name matches, as 'blocks.*.attn.*'; may be given "
            "repeatedly.",
        ),
    ] = None,
    microbatch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Samples per microbatch, to bound the memory."),
    ] = None,
) -> Problem:
    """The problem that the options shared by all commands describe."""
    if (target is None) == (model is None):
        _refuse("give either MODULE:FUNCTION or --model")
    if kind is not None and operator != "fisher":
        _refuse("only with --operator fisher", "--kind")
    return Problem(
        target or f"curvax.models.{model}:make_problem",
        _read_parameters(parameters or []),
        operator,
        kind,
        where or [],
        microbatch_size,
    )


def _read_parameters(given: list[str]) -> dict[str, Any]:
    """Names and values: what is a Python literal, as 3, 0.5 or None, is one, all else is text."""
    read: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not (equals and name.isidentifier()):
            _refuse(f"expected NAME=VALUE, as tokens=64, got {item!r}", "--set")
        if name in read:
            _refuse(f"{name} is given more than once; give it once", "--set")
        try:
            read[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            read[name] = text
    return read


def _find(target: str) -> Callable[..., Any]:
    """The function that a target names."""
    module_name, colon, name = target.rpartition(":")
    if not (colon and module_name and name.isidentifier()):
        _refuse(f"expected MODULE:FUNCTION, as my_module:make_problem, got {target!r}")
    try:
        module = _import(module_name)
    except Exception as error:
        _fail_in(target, error)
    function: Any = getattr(module, name, None)
    if not callable(function):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        public = [key for key in own if not key.startswith("_")]
        _refuse(f"{module_name!r} has no function {name!r}; it has {', '.join(public) or 'none'}")
    return function


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
        missing = error.name or ""
        if not f"{name}.".startswith(f"{missing}."):
            raise  # the module is there, and lacks something itself
        _refuse(f"no module {missing!r}{_neighbours(missing)}")


def _neighbours(missing: str) -> str:
    """Where a module was looked for, and what is there in its place."""
    package, _, name = missing.rpartition(".")
    folders = getattr(sys.modules[package], "__path__", []) if package else [str(Path.cwd())]
    found = [module.name for module in pkgutil.iter_modules(folders) if module.name[0] != "_"]
    near = difflib.get_close_matches(name, found)
    if package:
        return f"; {package!r} has {', '.join(near or found) or 'none'}"
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return " here or among the installed ones; a file is named with its .py"


def _check_parameters(target: str, function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Refuse arguments that the function does not take, and too few of them."""
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unknown = [name for name in given if name not in named]
    if unknown and not any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        has = f"it has {', '.join(named)}" if named else "it has none"
        _refuse(f"{target} has no parameter {unknown[0]!r}; {has}", "--set")
    for name, parameter in named.items():
        if parameter.default is kinds.empty and name not in given:
            _refuse(f"{target} needs a value: --set {name}=VALUE")


def _checked(target: str, problem: Any) -> tuple[Any, Any]:
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


def _fail_in(target: str, error: Exception) -> NoReturn:
    """End with what a problem's own code raised.

    Only its traceback tells where; but curvax's own frames tell a user nothing.
    """
    if isinstance(error, typer.BadParameter):
        raise error
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # A dataclass's own methods are in a file called <string>.
    if not all(file == "<string>" or Path(file).is_relative_to(_PACKAGE) for file in files):
        traceback.print_exception(error)
    fail(f"{target} raised {type(error).__name__}: {error}", Status.BAD_INPUT)


def _refuse(message: str, option: str = "MODULE:FUNCTION") -> NoReturn:
    raise typer.BadParameter(message, param_hint=option)
