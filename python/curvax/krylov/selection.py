"""Which eigenvalues are wanted, and in which order of preference."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from curvax.checks import is_integer, shown
from curvax.typing import Float64Array

WHICH = ("LM", "LA", "SA", "BE")

Indices = np.ndarray[Any, np.dtype[np.intp]]

# An unwanted pair may rank next to the wanted ones for ever, in a cluster: it counts as settled at
# this multiple of the residual allowed.
SETTLED = 3.0


class End(NamedTuple):
    """An end of the spectrum.

    Attributes:
        outward: `(m,)` how far outwards each value lies.
        place: where, in the order of preference, the wanted ones of this end stand.
        signs: of the values that lie far outwards.
    """

    outward: Float64Array
    place: slice
    signs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The k wanted eigenvalues.

    Attributes:
        which: `"LM"` largest magnitude, `"LA"` largest, `"SA"` smallest, `"BE"` both ends.
        high: how many from the high end (all of them for the others but `"SA"`).
        low: how many from the low end.
    """

    which: str
    high: int
    low: int

    @property
    def k(self) -> int:
        """How many in all."""
        return self.high + self.low

    def order(self, values: np.ndarray[Any, Any]) -> Indices:
        """Indices of `values` from the most to the least wanted; the first k are wanted."""
        ascending = np.argsort(values, kind="stable")
        if self.which == "LM":
            return np.argsort(-np.abs(values), kind="stable")
        if self.which == "LA":
            return ascending[::-1]
        if self.which == "SA":
            return ascending
        return self._both_ends(ascending)

    def _both_ends(self, ascending: Indices) -> Indices:
        ends = {"high": list(ascending[::-1]), "low": list(ascending)}
        turns = ["high"] * self.high + ["low"] * self.low
        turns += ["high", "low"] * len(ascending)
        order: list[int] = []
        taken: set[int] = set()
        for end in turns:
            if len(order) == len(ascending):
                break
            index = next(i for i in ends[end] if i not in taken)
            order.append(index)
            taken.add(index)
        return np.asarray(order, np.intp)

    def ends(self, values: Float64Array) -> list[End]:
        """The ends that hold wanted values; by magnitude, both ends are one."""
        if self.which == "BE":
            high = End(values, slice(0, self.high), (1,))
            low = End(-values, slice(self.high, self.k), (-1,))
            return [end for end in (high, low) if end.place.start < end.place.stop]
        outward = {"LM": np.abs(values), "LA": values, "SA": -values}[self.which]
        signs = {"LM": (1, -1), "LA": (1,), "SA": (-1,)}[self.which]
        return [End(outward, slice(0, self.k), signs)]

    def doubtful(
        self, values: Float64Array, residuals: Float64Array, order: Indices, allowed: Float64Array
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the wanted an unwanted value could displace, moved outwards by its residual.

        Args:
            values: `(m,)` Ritz values.
            residuals: `(m,)` their residual norms: an eigenvalue lies within.
            order: `self.order(values)`.
            allowed: `(min(k, m),)` the residual allowed of each of the wanted, in this order. One
                not wanted displaces none of an end if its residual is at most three times that of
                the last wanted there.

        Returns:
            `(min(k, m),)`, in the order of preference.
        """
        out = np.zeros(min(self.k, len(order)), bool)
        rest = order[self.k :]
        for outward, place, _ in self.ends(values):
            wanted = order[place]
            if not len(wanted):
                continue
            rising = rest[residuals[rest] > SETTLED * allowed[place][-1]]
            reach = (outward[rising] + residuals[rising]).max(initial=-np.inf)
            out[place] = outward[wanted] < reach
        return out

    def edges(self, values: Float64Array, margins: Float64Array) -> Float64Array:
        """The places at which another value would displace the last wanted one of an end.

        Args:
            values: `(k,)` the wanted, in the order of preference.
            margins: `(k,)` how much further out than each it would lie.
        """
        places: list[float] = []
        for outward, place, signs in self.ends(values):
            last = place.start + int(np.argmin(outward[place]))
            places += [sign * float(outward[last] + margins[last]) for sign in signs]
        return np.asarray(places)

    def hiding_places(self, values: Float64Array, margins: Float64Array) -> Float64Array:
        """Where an eigenvalue that was not found, and belongs among the wanted, would show least.

        Its Lanczos polynomial is least next to those found, which are roots of it: at the edges,
        and beside each. What is nearer to one found than half of the margin is not told from it.

        Args:
            values: `(k,)` the wanted, in the order of preference.
            margins: `(k,)` the distance from each.
        """
        edges = self.edges(values, margins)
        beside = np.concatenate([values - margins, values + margins])
        signs = np.concatenate([end.signs for end in self.ends(values)])
        further = (beside[:, None] - edges) * signs > 0
        places = np.concatenate([edges, beside[further.any(axis=1)]])
        apart = np.abs(places[:, None] - values) > 0.5 * margins
        return places[apart.all(axis=1)]

    def displaced(
        self, values: Float64Array, places: Float64Array
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the wanted values, in the order of preference, rank behind one of `places`."""
        out = np.zeros(len(values), bool)
        if len(places):
            for (outward, place, _), (further, _, _) in zip(
                self.ends(values), self.ends(places), strict=True
            ):
                out[place] = outward[place] < further.max()
        return out


def parse_wanted(k: Any, which: Any, n: int) -> Wanted:
    """Check `k` and `which`.

    Raises:
        TypeError: k is not an integer or, with `which="BE"`, a pair of integers.
        ValueError: unknown `which`, k < 1 or k > n, or a negative number in a pair.
    """
    if which not in WHICH:
        hint = ""
        if which in ("SM", "CM"):
            hint = "; eigenvalues near zero lie inside the spectrum, where Krylov methods fail"
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {shown(which)}{hint}")
    if isinstance(k, (tuple, list)):
        if which != "BE":
            raise TypeError(f"k as a pair (high, low) needs which='BE', got which={shown(which)}")
        if len(k) != 2 or not all(is_integer(part) for part in k):
            raise TypeError(
                f"k must be an integer or a pair of integers (high, low), got {shown(k)}"
            )
        high, low = int(k[0]), int(k[1])
        if min(high, low) < 0:
            raise ValueError(f"k=(high, low) must not be negative, got {shown(k)}")
    elif is_integer(k):
        high, low = {"SA": (0, int(k)), "BE": (int(k) - int(k) // 2, int(k) // 2)}.get(
            which, (int(k), 0)
        )
    else:
        raise TypeError(f"k must be an integer, got {shown(k)}")
    if not 1 <= high + low <= n:
        raise ValueError(f"k must be between 1 and n = {n}, got {shown(k)}")
    return Wanted(which, high, low)
