"""Two gradients of one model, leaf by leaf."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# A leaf whose gradient is a smaller part of the whole than this is compared relative to this part:
# the gradient of an attention's key bias is zero, and both sides compute rounding errors.
_SMALL_LEAF = 1 / 256


# The rounding errors of two right programs, in those that nudged parameters cause.
NOISE = 10.0


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients, leaves by name.

    Attributes:
        ours: of the converted model.
        theirs: of the source.
        allowed: the largest difference, relative.
        noise: by leaf, how much rounding errors change it.
    """

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    allowed: float
    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def forgiving(self, nudged: Mapping[str, Any]) -> "Gradients":
        """With the noise that gradients at nudged parameters show."""
        noise = {name: norm(nudged[name] - leaf) for name, leaf in self.ours.items()}
        return dataclasses.replace(self, noise=noise)

    @property
    def size(self) -> float:
        """The norm of the source's gradient."""
        return float(np.sqrt(sum(norm(leaf) ** 2 for leaf in self.theirs.values())))

    @property
    def whole(self) -> float:
        """The norm of the difference, relative."""
        squares = sum(norm(self.ours[n] - leaf) ** 2 for n, leaf in self.theirs.items())
        return ratio(float(np.sqrt(squares)), self.size)

    @property
    def allowed_of_whole(self) -> float:
        """The largest difference of the whole."""
        noise = float(np.sqrt(sum(value**2 for value in self.noise.values())))
        return max(self.allowed, NOISE * ratio(noise, self.size))

    @property
    def allowed_of_leaf(self) -> float:
        """The largest difference of the worst leaf."""
        return self._allowed(self.leaf)

    @property
    def leaf(self) -> str:
        """The name of the worst leaf."""
        worst = {n: self._difference(n) / self._allowed(n) for n in self.theirs}
        return max(worst, key=lambda name: np.inf if np.isnan(worst[name]) else worst[name])

    @property
    def of_leaf(self) -> float:
        """The difference of the worst leaf, relative."""
        return self._difference(self.leaf)

    @property
    def passed(self) -> bool:
        """Whether no difference is larger than allowed."""
        return self.of_leaf <= self.allowed_of_leaf

    def _scale(self, name: str) -> float:
        return max(norm(self.theirs[name]), _SMALL_LEAF * self.size)

    def _difference(self, name: str) -> float:
        return ratio(norm(self.ours[name] - self.theirs[name]), self._scale(name))

    def _allowed(self, name: str) -> float:
        return max(self.allowed, NOISE * ratio(self.noise.get(name, 0.0), self._scale(name)))


def norm(x: Any) -> float:
    """Of all elements."""
    return float(np.linalg.norm(np.ravel(x)))


def ratio(part: float, whole: float) -> float:
    """A relative difference; infinite of nothing."""
    return part / whole if whole > 0 else (0.0 if part == 0 else np.inf)
