"""What a computation over the diagonal blocks of an operator returns."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np

from curvax.results.eigen import EigenResult
from curvax.results.estimates import DiagonalResult, TraceResult, summary
from curvax.results.stored import Stored
from curvax.results.tables import aligned, measured

BlockResult = EigenResult | TraceResult | DiagonalResult
_R = TypeVar("_R", bound=BlockResult)

_MAX_VALUES = 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockResults(Stored, Mapping[str, _R]):
    """The results of an operator's diagonal blocks, by name: an immutable mapping.

    Attributes:
        results: by the block's name, in the order of the blocks; all of one class, `EigenResult`,
            `TraceResult` or `DiagonalResult`.
        sizes: by the block's name, its number of parameters.
    """

    results: Mapping[str, _R]
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        """Copy both mappings.

        Raises:
            TypeError: the results are not all of one of the three classes.
            ValueError: `sizes` has other names than `results`.
        """
        kinds = {type(result) for result in self.results.values()}
        if len(kinds) > 1 or not kinds <= {EigenResult, TraceResult, DiagonalResult}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(
                "results must all be EigenResult, all TraceResult or all DiagonalResult, got "
                f"{names}"
            )
        if list(self.sizes) != list(self.results):
            raise ValueError(
                f"sizes must have the names of results, {list(self.results)}, got "
                f"{list(self.sizes)}"
            )
        object.__setattr__(self, "results", dict(self.results))
        object.__setattr__(self, "sizes", dict(self.sizes))

    def __getitem__(self, name: str) -> _R:
        """The result of the block of that name."""
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the blocks."""
        return iter(self.results)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.results)

    @property
    def num_matvecs(self) -> int:
        """Vectors multiplied, over all blocks.

        Where products served several blocks at once, they count in each.
        """
        return sum(result.num_matvecs for result in self.values())

    @property
    def num_verification(self) -> int:
        """Vectors multiplied to measure residuals, over all blocks; 0 where nothing has one."""
        eigen = [result for result in self.values() if isinstance(result, EigenResult)]
        return sum(result.num_verification for result in eigen)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the computation."""
        return any(result.interrupted for result in self.values())

    @property
    def all_converged(self) -> bool:
        """Whether every pair of every block converged.

        Raises:
            AttributeError: the results are not eigenpairs.
        """
        converged = []
        for name, result in self.items():
            if not isinstance(result, EigenResult):
                raise AttributeError(
                    f"all_converged is for eigenpairs, but block {name!r} has a "
                    f"{type(result).__name__}: look at its standard errors"
                )
            converged.append(result.all_converged)
        return all(converged)

    def __str__(self) -> str:
        """One row per block.

        Of eigenpairs: size, up to three eigenvalues of largest magnitude, the worst residual, how
        many converged. Of traces: size, estimate, standard error, trace per parameter. Of
        diagonals: size, sum, mean, least and largest entry. Why there are no intervals or standard
        errors is said below.
        """
        rows, header = [], ["block", "size"]
        for name, result in self.items():
            row, titles = _row(result, self.sizes[name])
            rows.append([name, f"{self.sizes[name]:,}", *row])
            header[2:] = titles
        notes = dict.fromkeys(_note(result) for result in self.values())
        if self.interrupted:
            notes["interrupted: the results are what was known by then"] = None
        return "\n".join([aligned(header, rows, named=True), *filter(None, notes)])


def _note(result: BlockResult) -> str:
    if isinstance(result, TraceResult) and result.no_interval:
        return f"no intervals: {result.no_interval}"
    if isinstance(result, DiagonalResult) and result.no_stderr:
        return f"no standard errors: {result.no_stderr}"
    return ""


def _row(result: BlockResult, size: int) -> tuple[list[str], list[str]]:
    """The cells of a block after its size, and their titles."""
    if isinstance(result, EigenResult):
        values = result.eigenvalues
        first = values[np.argsort(-np.abs(values), kind="stable")][:_MAX_VALUES]
        shown = "".join(f"{value:>10.4g}" for value in first)
        worst = measured(float(np.max(result.residuals, initial=0.0)))
        done = f"{np.sum(result.converged)}/{len(values)}"
        return [shown, worst, done], ["largest", "residual", "converged"]
    if isinstance(result, TraceResult):
        cells = [result.estimate, result.stderr, result.estimate / size]
        texts = [f"{cells[0]:.6g}", f"{cells[1]:.2e}", f"{cells[2]:.4g}"]
        return texts, ["trace", "stderr", "trace/size"]
    entries = [entries for entries, _ in result.leaves().values()]
    return list(summary(entries)), ["sum", "mean", "min", "max"]
