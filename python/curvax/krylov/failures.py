"""What a solve says and keeps when memory runs out after all, or a kernel does not start."""

from types import TracebackType

import jax

from curvax.krylov.plan import Plan, remedy
from curvax.krylov.scaling import exponent_of
from curvax.krylov.thick_restart import Solve
from curvax.memory import memory_of, readable
from curvax.operators.base import Operator
from curvax.results import EigenResult
from curvax.results.units import rescaled

# What XLA says where an allocation fails, and CUDA, of a launch.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")


class OutOfMemory(MemoryError):  # noqa: N818 - its base class has the name of an error
    """Memory ran out in a solve.

    Attributes:
        result: what was known by then, as after Ctrl-C; None if that was nothing.
    """

    result: EigenResult | None = None


class KernelFailure(RuntimeError):  # noqa: N818 - likewise
    """A compiled kernel could not be run.

    Attributes:
        result: see `OutOfMemory`.
    """

    result: EigenResult | None = None


class Explained:
    """Within the context, failures of the device become errors that name forecast and remedy."""

    def __init__(self, op: Operator) -> None:
        self.op = op
        self.plan: Plan | None = None
        self.solve: Solve | None = None

    def __enter__(self) -> "Explained":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, jax.errors.JaxRuntimeError):
            return
        said = str(error).partition("\n")[0]
        failure: OutOfMemory | KernelFailure
        if any(words in said for words in _OUT_OF_MEMORY):
            failure = OutOfMemory(f"memory ran out {self._where()} ({said}): {self._memory()}")
        elif "curvax" in said:
            failure = KernelFailure(
                f"a compiled kernel failed {self._where()} ({said}): set CURVAX_IMPL=reference to "
                f"do without it; if the device is short of memory, {self._memory()}"
            )
        else:
            return
        failure.result = self._result()
        if failure.result is not None:
            failure.add_note("What was known by then is the attribute `result` of this error.")
        raise failure from error

    def _where(self) -> str:
        if self.solve is None:
            return "before the first product"
        return f"after {self.solve.state.matvecs} products"

    def _memory(self) -> str:
        memory = memory_of(self.op)
        free = f"{readable(memory.free)} are free"
        if self.plan is None:
            return ", ".join([free, *memory.remedies])
        return f"{free}. {remedy(self.plan, memory)}. The forecast:\n{self.plan}"

    def _result(self) -> EigenResult | None:
        if self.solve is None:
            return None
        result = self.solve.salvage()
        return None if result is None else rescaled(result, -exponent_of(self.solve.op))
