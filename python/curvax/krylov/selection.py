"""Which eigenvalues are wanted, and in which order of preference."""

import dataclasses
from typing import Any

import numpy as np

from curvax.checks import shown

WHICH = ("LM", "LA", "SA", "BE")

Indices = np.ndarray[Any, np.dtype[np.intp]]


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

    def doubtful(
        self,
        values: np.ndarray[Any, Any],
        residuals: np.ndarray[Any, Any],
        order: Indices,
        settled: float,
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the wanted the next in line would displace, moved outwards by its residual.

        Args:
            values: `(m,)` Ritz values.
            residuals: `(m,)` their residual norms: an eigenvalue lies within.
            order: `self.order(values)`.
            settled: one next in line whose residual is at most this displaces none.

        Returns:
            `(min(k, m),)`, in the order of preference.
        """
        if self.which == "BE":
            ends = [(values, 0, self.high, 0), (-values, self.high, self.k, 1)]
        else:
            outward = {"LM": np.abs(values), "LA": values, "SA": -values}[self.which]
            ends = [(outward, 0, self.k, 0)]
        out = np.zeros(min(self.k, len(order)), bool)
        for outward, first, stop, skipped in ends:
            # Beyond the wanted the two ends take turns, the high end first.
            following = order[self.k + skipped :][:1]
            reach = outward[following] + residuals[following]
            reach = reach[residuals[following] > settled].max(initial=-np.inf)
            out[first:stop] = outward[order[first:stop]] < reach
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
        if len(k) != 2 or not all(_is_integer(part) for part in k):
            raise TypeError(
                f"k must be an integer or a pair of integers (high, low), got {shown(k)}"
            )
        high, low = int(k[0]), int(k[1])
        if min(high, low) < 0:
            raise ValueError(f"k=(high, low) must not be negative, got {shown(k)}")
    elif _is_integer(k):
        high, low = {"SA": (0, int(k)), "BE": (int(k) - int(k) // 2, int(k) // 2)}.get(
            which, (int(k), 0)
        )
    else:
        raise TypeError(f"k must be an integer, got {shown(k)}")
    if not 1 <= high + low <= n:
        raise ValueError(f"k must be between 1 and n = {n}, got {shown(k)}")
    return Wanted(which, high, low)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
