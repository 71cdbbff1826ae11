"""A function named by `MODULE:FUNCTION`: found, given its arguments, and called."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from curvax.cli.exits import Status, fail

if TYPE_CHECKING:
    from curvax.operators.model import Model

_PACKAGE = Path(__file__).parents[1]


def read_parameters(given: list[str]) -> dict[str, Any]:
    """Names and values: what is a Python literal, as 3, 0.5 or None, is one, all else is text."""
    read: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not (equals and name.isidentifier()):
            refuse(f"expected NAME=VALUE, as tokens=64, got {item!r}", "--set")
        if name in read:
            refuse(f"{name} is given more than once; give it once", "--set")
        try:
            read[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            read[name] = text
    return read


def find_target(target: str) -> Callable[..., Any]:
    """The function that a target names."""
    module_name, colon, name = target.rpartition(":")
    if not (colon and module_name and name.isidentifier()):
        refuse(f"expected MODULE:FUNCTION, as my_module:make_problem, got {target!r}")
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
        refuse(f"{module_name!r} has no function {name!r}; it has {', '.join(public) or 'none'}")
    return function


def _import(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            refuse(f"no such file: {name!r}")
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
        refuse(f"no module {missing!r}{_neighbours(missing)}")


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
        refuse(f"{target} has no parameter {unknown[0]!r}; {has}", "--set")
    for name, parameter in named.items():
        if parameter.default is kinds.empty and name not in given:
            refuse(f"{target} needs a value: --set {name}=VALUE")


def make_problem(
    target: str, function: Callable[..., Any], parameters: dict[str, Any]
) -> tuple[Model, Any]:
    """The model and the batches that the function returns, or a refusal."""
    from curvax.operators.foreign import adapter_of
    from curvax.operators.model import Model

    _check_parameters(target, function, parameters)
    try:
        problem = function(**parameters)
    except Exception as error:
        _fail_in(target, error)
    if not (isinstance(problem, tuple) and len(problem) == 2 and isinstance(problem[0], Model)):
        got = type(problem).__name__
        if isinstance(problem, tuple):
            got += f" of {', '.join(type(part).__name__ for part in problem)}"
        adapter = adapter_of(problem[0] if isinstance(problem, tuple) and problem else problem)
        remedy = f"; make a model of it by {adapter}" if adapter else ""
        refuse(
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


def refuse(message: str, option: str = "MODULE:FUNCTION") -> NoReturn:
    """End with a message about an argument of the command."""
    raise typer.BadParameter(message, param_hint=option)
