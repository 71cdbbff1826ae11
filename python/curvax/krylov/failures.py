"""What a solve or an estimate says, and a solve keeps, when the device fails it after all."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, runtime_checkable

import jax

from curvax.device import programs
from curvax.krylov.plan import Plan, product_remedies, remedy
from curvax.krylov.scaling import exponent_of
from curvax.memory import memory_of, readable
from curvax.operators import failures
from curvax.operators.base import Operator
from curvax.operators.failures import OutOfMemory
from curvax.results import EigenResult
from curvax.results.units import rescaled


@runtime_checkable
class Solving(Protocol):
    """What an unfinished solve is asked for."""

    op: Operator

    @property
    def made(self) -> int:
        """Products so far."""

    def salvage(self) -> EigenResult | None:
        """What is known, without another product; None if that is nothing."""


_Solve = TypeVar("_Solve", bound=Solving)


class Explained(failures.Explained):
    """The same for what multiplies by an operator.

    Attributes:
        plan: of a solve; its forecast is told then.
        solve: what of it is under way.
    """

    def __init__(self, op: Operator, remedies: Sequence[str] = (), block: int = 1) -> None:
        """Tell what to say.

        Args:
            op: the operator.
            remedies: of an estimate: what lets it need less memory, its block size aside.
            block: vectors per product.
        """
        smaller = ["lower block_size"] if block > 1 else []
        super().__init__(op, [*smaller, *remedies, *product_remedies(op)])
        self.op = op
        self.block = block
        self.plan: Plan | None = None
        self.solve: Solving | None = None

    def __enter__(self) -> Self:
        return self

    @contextlib.contextmanager
    def follows(self, solve: _Solve) -> Iterator[_Solve]:
        """Within the context a failure is that of `solve`, from which then comes what is kept."""
        try:
            yield solve
        except (RuntimeError, ValueError):
            # Not at other errors, after which another solve may begin beside the basis of this.
            self.solve = solve
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # NumPy's, or that of a product in Python, as it is or in XLA's account of a callback.
        lacking = isinstance(error, MemoryError) or re.search("^MemoryError", str(error), re.M)
        if error is not None and lacking and self.plan and not isinstance(error, OutOfMemory):
            error.add_note(f"It was raised in a solve with this forecast:\n{self.plan}")
        super().__exit__(kind, error, traceback)

    def _where(self) -> str:
        if self.plan is None:
            return ""
        if self.solve is None:
            return " before the first product"
        return f" after {self.solve.made} products"

    def _known(self) -> str:
        vectors = jax.ShapeDtypeStruct((self.block, self.op.shape[0]), self.op.dtype)
        scratch = programs.multiply.known_work_bytes(self.op, vectors)
        if scratch is None:
            return ""
        size = self.block * self.op.shape[0] * self.op.dtype.itemsize
        return f", and a product takes {readable(size + scratch)}"

    def _memory(self) -> str:
        if self.plan is None:
            return super()._memory()
        memory = memory_of(self.op)
        remedies = remedy(self.op, self.plan, memory)
        return f"{readable(memory.free)} are free. {remedies}. The forecast:\n{self.plan}"

    def _result(self) -> EigenResult | None:
        if self.solve is None:
            return None
        result = self.solve.salvage()
        return None if result is None else rescaled(result, -exponent_of(self.solve.op))
