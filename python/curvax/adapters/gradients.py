"""Two gradients of one model, leaf by leaf."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

from curvax.typing import PyTree

# A leaf whose gradient is a smaller part of the whole than this is compared relative to this part:
# the gradient of an attention's key bias is zero, and both sides compute rounding errors.
_SMALL_LEAF = 1 / 256


# The rounding errors of two right programs, in those that nudged parameters cause.
NOISE = 10.0


@dataclasses.dataclass(frozen=True)
class Gradients:
    """How far two gradients are apart, by leaf.

    Attributes:
        differences: norms of the differences.
        sizes: norms of the source's gradient.
        allowed: the largest difference, relative.
        noise: norms of what rounding errors change; none if they were not measured.
    """

    differences: Mapping[str, float]
    sizes: Mapping[str, float]
    allowed: float
    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, ours: Mapping[str, PyTree], theirs: Mapping[str, PyTree], allowed: float
    ) -> "Gradients":
        """The distances between leaves of the same names."""
        sizes = {name: norm(leaf) for name, leaf in theirs.items()}
        return cls(distances(ours, theirs), sizes, allowed)

    @functools.cached_property
    def size(self) -> float:
        """The norm of the source's gradient."""
        return math.hypot(*self.sizes.values())

    @property
    def whole(self) -> float:
        """The norm of the difference, relative."""
        return ratio(math.hypot(*self.differences.values()), self.size)

    @property
    def allowed_of_whole(self) -> float:
        """The largest difference of the whole."""
        return max(self.allowed, NOISE * ratio(math.hypot(*self.noise.values()), self.size))

    @functools.cached_property
    def leaf(self) -> str:
        """The name of the worst leaf."""
        worst = {name: self._difference(name) / self._allowed(name) for name in self.sizes}
        return max(worst, key=lambda name: math.inf if math.isnan(worst[name]) else worst[name])

    @property
    def of_leaf(self) -> float:
        """The difference of the worst leaf, relative."""
        return self._difference(self.leaf)

    @property
    def allowed_of_leaf(self) -> float:
        """The largest difference of the worst leaf."""
        return self._allowed(self.leaf)

    @property
    def passed(self) -> bool:
        """Whether no difference is larger than allowed."""
        return self.of_leaf <= self.allowed_of_leaf

    def _scale(self, name: str) -> float:
        return max(self.sizes[name], _SMALL_LEAF * self.size)

    def _difference(self, name: str) -> float:
        return ratio(self.differences[name], self._scale(name))

    def _allowed(self, name: str) -> float:
        return max(self.allowed, NOISE * ratio(self.noise.get(name, 0.0), self._scale(name)))


def distances(a: Mapping[str, PyTree], b: Mapping[str, PyTree]) -> dict[str, float]:
    """Norms of the differences of leaves, by name."""
    return {name: norm(np.subtract(a[name], leaf, dtype=np.float64)) for name, leaf in b.items()}


def norm(x: ArrayLike) -> float:
    """Of all elements."""
    return float(np.linalg.norm(np.ravel(x).astype(np.float64, copy=False)))


def ratio(part: float, whole: float) -> float:
    """A relative difference; infinite of nothing."""
    return part / whole if whole > 0 else (0.0 if part == 0 else np.inf)
