"""Options of public functions: declared once, with their types and defaults.

Functions that share options, or that have overloads, declare them in a `TypedDict`, where the type
of an entry carries what it is by default:

    class Options(TypedDict, total=False):
        tol: Annotated[float, 1e-3]
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

_F = TypeVar("_F", bound=Callable[..., Any])

# What SciPy and others call the options of ours.
_ELSEWHERE = {
    "maxiter": "max_matvecs",
    "max_iter": "max_matvecs",
    "ncv": "max_basis",
    "tolerance": "tol",
    "rtol": "tol",
    "rng": "seed",
    "key": "seed",
}


def takes_options(declared: type | None = None) -> Callable[[_F], _F]:
    """Let a function name what was meant where an argument is misspelt, or given twice.

    Args:
        declared: a `TypedDict` with the options that `**options` stands for. The function gets all
            of them, and its signature, as `help` shows it, lists them after its own. Without it,
            `**options` may be of any name: they are for something else that the function calls.

    Returns:
        A decorator.
    """

    def decorate(function: _F) -> _F:
        signature = _signature(function, declared)
        defaults = {p.name: p.default for p in _declared(declared)}
        kinds = {name: p.kind for name, p in signature.parameters.items()}
        names = [name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD]
        positional = [*kinds.values()].count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes_all = len(names) < len(kinds)
        bound = names[:1] == ["self"]

        @functools.wraps(function)
        def call(*args: object, **given: object) -> Any:
            meant = given.keys() & set(names) if takes_all else given.keys()
            twice = meant & set(names[: min(positional, len(args))])
            if twice or len(args) > positional or not meant <= set(names):
                said = [name for name in given if name in meant]
                _refuse(function.__name__, names[bound:], positional - bound, args[bound:], said)
            return function(*args, **{**defaults, **given})

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _declared(declared: type | None) -> list[inspect.Parameter]:
    if declared is None:
        return []
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=hint.__metadata__[0],
            annotation=hint.__origin__,
        )
        for name, hint in get_type_hints(declared, include_extras=True).items()
    ]


class _Text(str):
    """An annotation as `help` shows it, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def annotation_text(annotation: object) -> object:
    """An annotation as it was written; evaluated ones without the modules of their names."""
    if annotation is inspect.Parameter.empty:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _Text(re.sub(r"\b[a-z_]\w*\.(?=[A-Za-z_])", "", text))


def _signature(function: Callable[..., Any], declared: type | None) -> inspect.Signature:
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if declared is None or p.kind is not p.VAR_KEYWORD]
    parameters = [
        p.replace(annotation=annotation_text(p.annotation)) for p in (*kept, *_declared(declared))
    ]
    return own.replace(
        parameters=parameters, return_annotation=annotation_text(own.return_annotation)
    )


def _refuse(
    function: str,
    names: list[str],
    positional: int,
    args: tuple[object, ...],
    given: Sequence[str],
) -> NoReturn:
    """Raise for the first thing that is wrong; the first `positional` names have a position."""
    for name in given:
        if name in names[: min(positional, len(args))]:
            place = names.index(name) + 1
            raise TypeError(
                f"{function} got {name} twice, as argument {place} and as {name}=: leave one out"
            )
        if name not in names:
            raise unknown(function, name, names)
    rest = names[positional:]
    remedy = f": give the others by name, such as {rest[0]}=" if rest else ""
    raise TypeError(
        f"{function} takes {_listed(names[:positional])} by position, got {len(args)} arguments "
        f"there{remedy}"
    )


def unknown(function: str, name: str, names: Sequence[str]) -> TypeError:
    """The error for an argument that a function does not have; its own are `names`."""
    near = difflib.get_close_matches(name, names, n=3)
    if not near and _ELSEWHERE.get(name) in names:
        near = [_ELSEWHERE[name]]
    hint = f"did you mean {_listed(near, 'or')}?" if near else f"it has {_listed(names)}"
    return TypeError(f"{function} has no argument {name!r}: {hint}")


def _listed(names: Sequence[str], word: str = "and") -> str:
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last
