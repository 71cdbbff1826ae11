"""How a result is drawn: the package registers who draws, so that results know no pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Any, str | Path | None, str | None], "Figure"]

_registered: list[Callable[[], Draw]] = []


def register(load: Callable[[], Draw]) -> None:
    """Let `load()`, called when a result is first drawn, give the function that draws."""
    _registered[:] = [load]


def draw(result: Any, path: str | Path | None, title: str | None) -> Figure:
    """Draw a result with what is registered."""
    (load,) = _registered
    return load()(result, path, title)
