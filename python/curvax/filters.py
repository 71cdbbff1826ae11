"""Parameter filters: which leaves of a pytree an operator acts on.

A leaf's name is its pytree path joined by dots: `blocks.0.attn.qkv`.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np

from curvax.checks import cut, shown
from curvax.typing import Params, PyTree, PyTreeDef

Filter: TypeAlias = Callable[[str, object], bool] | PyTree
"""A predicate `(name, leaf) -> bool`, or a pytree of bools with the structure of the params."""


class NamePattern:
    """A predicate on a leaf's name that knows its patterns, so that errors can name them."""

    def __init__(self, patterns: Sequence[str], matches: Callable[[str, str], bool]) -> None:
        self.patterns = tuple(patterns)
        self._matches = matches

    def __call__(self, name: str, leaf: object) -> bool:
        """Whether any pattern matches `name`."""
        return any(self._matches(name, pattern) for pattern in self.patterns)


def match_names(*patterns: str) -> NamePattern:
    """Select the leaves whose whole name matches a shell pattern; `*` crosses dots.

    Args:
        patterns: such as `"blocks.*.attn.*"`; any of them may match.

    Raises:
        TypeError: no pattern, or one that is not a string.
    """
    _check_patterns("match_names", patterns)
    return NamePattern(patterns, fnmatch.fnmatchcase)


def match_regex(*patterns: str) -> NamePattern:
    """Select the leaves in whose name a regular expression is found.

    Args:
        patterns: regular expressions, searched anywhere in the name; any of them may match.

    Raises:
        TypeError: no pattern, or one that is not a string.
        ValueError: a pattern is not a regular expression.
    """
    _check_patterns("match_regex", patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"match_regex takes regular expressions, got {pattern!r}: {error}"
            ) from error
    return NamePattern(patterns, lambda name, pattern: re.search(pattern, name) is not None)


def _check_patterns(function: str, patterns: Sequence[str]) -> None:
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{function} takes one or more strings, got {shown(patterns)}")


def leaf_names(tree: PyTree) -> list[str]:
    """The name of each leaf of `tree`, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def difference(wanted: PyTreeDef, got: PyTreeDef) -> str:
    """How a structure of a pytree differs from the one wanted, for messages."""
    text = f"{cut(str(wanted))}, got {cut(str(got))}"
    if wanted.num_leaves + got.num_leaves > 2**16:
        return text
    names, others = _names_in(wanted), _names_in(got)
    for what, one, other in (("without", names, others), ("with", others, names)):
        known = set(other)
        extra = [cut(repr(name)) for name in one if name not in known]
        if extra and names and others:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            text += f", {what} {', '.join(extra[:3])}{more}"
    return text


def _names_in(structure: PyTreeDef) -> list[str]:
    try:
        return leaf_names(jax.tree.unflatten(structure, range(structure.num_leaves)))
    except Exception:  # the class of a node may refuse numbers
        return []


def select(params: Params, where: Filter | None) -> tuple[bool, ...]:
    """Apply a filter.

    Args:
        params: a pytree.
        where: None for all leaves, a predicate `(name, leaf) -> bool`, or a pytree of bools.

    Returns:
        One bool per leaf of `params`.

    Raises:
        TypeError: `where` is neither callable nor a pytree of bools.
        ValueError: a mask of another structure, or nothing was selected.
    """
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    if callable(where):
        return matching(names, leaves, where, "where")
    chosen = [True] * len(leaves) if where is None else _mask(params, where)
    if not any(chosen):
        raise ValueError(f"where selects no parameter: {_nearest(where, names)}")
    return tuple(chosen)


def matching(
    names: Sequence[str], leaves: Sequence[object], where: Callable[[str, object], bool], what: str
) -> tuple[bool, ...]:
    """Apply a predicate to named leaves; `what` is its name in messages.

    Raises:
        ValueError: nothing was selected.
    """
    chosen = tuple(bool(where(name, leaf)) for name, leaf in zip(names, leaves, strict=True))
    if not any(chosen):
        raise ValueError(f"{what} selects no parameter: {_nearest(where, names)}")
    return chosen


def _mask(params: Params, where: PyTree) -> list[bool]:
    mask = jax.tree.leaves(where)
    if not mask or not all(isinstance(entry, (bool, np.bool_)) for entry in mask):
        meant = f": did you mean match_names({shown(where)})?" if isinstance(where, str) else ""
        raise TypeError(
            "where must be a predicate (name, leaf) -> bool such as match_names(...), or a pytree "
            f"of bools; got {shown(where)}{meant}"
        )
    expected: PyTreeDef = jax.tree.structure(params)
    if jax.tree.structure(where) != expected:
        raise ValueError(
            "where, a pytree of bools, must have the structure of params: expected "
            f"{difference(expected, jax.tree.structure(where))}"
        )
    return [bool(entry) for entry in mask]


def _nearest(where: Filter | None, names: Sequence[str]) -> str:
    if not names:
        return "params has no leaves"
    patterns = where.patterns if isinstance(where, NamePattern) else ()
    near = [
        match
        for pattern in patterns
        for match in difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    ]
    listed = ", ".join(repr(name) for name in dict.fromkeys(near or names[:5]))
    asked = f"{', '.join(map(repr, patterns))} matches no name; " if patterns else ""
    return f"{asked}{'the nearest are' if near else 'the names begin with'} {listed}"
