"""What is said where a device has no memory left, or does not start a kernel."""

import re
from collections.abc import Sequence
from types import TracebackType

import jax

from curvax.memory import memory_of, readable
from curvax.results import EigenResult
from curvax.typing import PyTree

# What XLA says where an allocation fails, and CUDA, of a launch.
_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
# How XLA's account of a failure begins.
_STATUS = re.compile(
    "(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|"
    "PERMISSION_DENIED|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|"
    "INTERNAL|UNAVAILABLE|DATA_LOSS|UNAUTHENTICATED): "
)


class OutOfMemory(MemoryError):  # noqa: N818 - its base class has the name of an error
    """Memory ran out in a computation.

    Attributes:
        result: what a solve knew by then, as after Ctrl-C; None if that was nothing.
    """

    result: EigenResult | None = None


class KernelFailure(RuntimeError):  # noqa: N818 - likewise
    """A compiled kernel could not be run.

    Attributes:
        result: see `OutOfMemory`.
    """

    result: EigenResult | None = None


def is_runtime_error(error: BaseException | None) -> bool:
    """Whether it is XLA's: a `JaxRuntimeError`, or, of a program that had run before, ValueError.

    A compiled program is called through C++ from its second run on, where a status has that type.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return type(error) is ValueError and _STATUS.match(str(error)) is not None


class Explained:
    """Within the context, failures of the device become errors that name memory and remedies."""

    def __init__(self, arrays: PyTree, remedies: Sequence[str] = (), where: str = "") -> None:
        """Tell what to say.

        Args:
            arrays: a pytree, as an operator, that lies in the memory in question.
            remedies: what lets the computation need less of it.
            where: in what, to follow "memory ran out".
        """
        self.arrays = arrays
        self.remedies = list(remedies)
        self.where = where

    def __enter__(self) -> "Explained":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not is_runtime_error(error):
            return
        said = str(error).partition("\n")[0]
        failure: OutOfMemory | KernelFailure
        if _OUT_OF_MEMORY.search(said):
            failure = OutOfMemory(f"memory ran out{self._where()} ({said}): {self._memory()}")
        elif "curvax" in said:
            failure = KernelFailure(
                f"a compiled kernel failed{self._where()} ({said}): set CURVAX_IMPL=reference to "
                f"do without it; if the device is short of memory, {self._memory()}"
            )
        else:
            return
        failure.result = self._result()
        if failure.result is not None:
            failure.add_note("What was known by then is the attribute `result` of this error.")
        raise failure from error

    def _where(self) -> str:
        return f" {self.where}" if self.where else ""

    def _known(self) -> str:
        """What is known of the memory beside what is free."""
        return ""

    def _memory(self) -> str:
        try:
            memory = memory_of(self.arrays)
        except RuntimeError:
            free, more = "how much memory is free is not known", []
        else:
            free, more = f"{readable(memory.free)} are free", memory.remedies
        return f"{free}{self._known()}. {alternatives([*self.remedies, *more])}".removesuffix(". ")

    def _result(self) -> EigenResult | None:
        return None


def alternatives(remedies: Sequence[str]) -> str:
    """`a, b, or c`."""
    if len(remedies) < 2:
        return "".join(remedies)
    return f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
