"""Options of public functions: declared once, with their types and defaults.

Functions that share options, or that have overloads, declare them in a `TypedDict`, where the type
of an entry carries what it is by default:

    class Options(TypedDict, total=False):
        tol: Annotated[float, 1e-3]
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

_F = TypeVar("_F", bound=Callable[..., Any])


def takes_options(declared: type | None = None) -> Callable[[_F], _F]:
    """Let a function name what was meant where an argument is misspelt, or given twice.

    Args:
        declared: a `TypedDict` with the options that `**options` stands for. The function gets all
            of them, and its signature, as `help` shows it, lists them after its own.

    Returns:
        A decorator.
    """

    def decorate(function: _F) -> _F:
        signature = _signature(function, declared)
        defaults = {p.name: p.default for p in _declared(declared)}
        by_position = [
            p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            twice = given.keys() & by_position[: len(args)]
            if twice or not given.keys() <= signature.parameters.keys():
                _refuse(function.__name__, list(signature.parameters), by_position, args, given)
            if len(args) > len(by_position):
                rest = list(signature.parameters)[len(by_position) :]
                raise TypeError(
                    f"{function.__name__} takes {_listed(by_position)} by position, got "
                    f"{len(args)} arguments there: give the others by name, such as {rest[0]}="
                )
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


def _signature(function: Callable[..., Any], declared: type | None) -> inspect.Signature:
    own = inspect.signature(function)
    if declared is None:
        return own
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=[*kept, *_declared(declared)])


def _refuse(
    function: str,
    names: list[str],
    by_position: list[str],
    args: tuple[Any, ...],
    given: dict[str, Any],
) -> None:
    for name in given:
        if name in by_position[: len(args)]:
            place = by_position.index(name) + 1
            raise TypeError(
                f"{function} got {name} twice, as argument {place} and as {name}=: leave one out"
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f"did you mean {_listed(near, 'or')}?" if near else f"it has {_listed(names)}"
            raise TypeError(f"{function} has no argument {name!r}: {hint}")


def _listed(names: Sequence[str], word: str = "and") -> str:
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last
