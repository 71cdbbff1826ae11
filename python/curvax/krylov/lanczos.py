"""Block Lanczos with full reorthogonalisation and thick restarts.

The decomposition kept by the state, with b the block size:

    A Q_m = Q_m T + Q_new E  (+ the error of the products)
    Q_m   : (m, n) rows of the basis, orthonormal up to the rounding of stored rows
    Q_new : (b, n) the next block, orthonormal and orthogonal to Q_m; not yet multiplied
    T     : (m, m) the projection Q_m A Q_mᵀ, its upper triangle measured column by column
    E     : (b, m) the coupling; zero but for the last b columns, or all of them after a restart

so a Ritz pair (θ, Q_mᵀ y) of T y = θ y has the residual norm ‖E y‖. A restart keeps p Ritz vectors,
for which T is diagonal and E is E Y_p (Wu & Simon 2000, "Thick-restart Lanczos", section 2; block
form: Zhou & Saad 2008). Each column of T is measured by the orthogonalisation of A Q_new, so what
symmetry demands of it beforehand (the column of E) measures the error of the products for free.

Rows stored in 16 bits are orthonormal up to their roundoff (2e-4 in float16), or that over √n where
they are spread over all entries, and so accurate are the eigenvalues of T. What the recurrence
leaves out is the rounding of Q_new, times E, which shows in measured residuals alone.

Nothing that the next step is computed from comes from the host. So a device is given it before the
numbers of the one before have been read, and works while the host looks at them; what the host
finds is then one step late, and steps that are over sooner than that are given several at a time.
On a CPU, which is the host, each step is read before the next.
"""

import collections
import math
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.blas import one_thread
from curvax.checks import seed_word
from curvax.device import programs, storage
from curvax.krylov.exclusion import Cycle, log_growth
from curvax.krylov.scaling import check_range
from curvax.memory import on_device
from curvax.operators.base import Operator
from curvax.operators.evidence import ASYMMETRY_LIMIT, report_nonfinite
from curvax.operators.precision import more_accurate
from curvax.program import Clock, host
from curvax.typing import DTypeLike, Float64Array

# Seconds below which a step is over before the host has read the one before and given the next.
_SHORT = 5e-3


class Ritz(NamedTuple):
    """Ritz pairs of the projection.

    Attributes:
        values: `(m,)` ascending.
        vectors: `(m, m)` columns, in the basis.
        residuals: `(m,)` norms, estimated by the recurrence.
        scale: the largest absolute Ritz value seen so far: the estimate of |λ|max. A restart for
            one end of the spectrum forgets the other.
    """

    values: Float64Array
    vectors: Float64Array
    residuals: Float64Array
    scale: float


class _Begun(NamedTuple):
    """Steps that were given to the device together.

    Attributes:
        first: the row of the block that the first of them multiplies.
        steps: how many.
        numbers: `(>= steps, ...)` on the device, a row for each; see `programs.unpack`.
        moment: when they were given.
    """

    first: int
    steps: int
    numbers: Array
    moment: float


class Lanczos:
    """The state of a solve: the basis on the device, T and E on the host.

    Attributes:
        basis: `(rows, columns)`, see `storage`.
        n: the length of its vectors.
        used: rows of the basis that are written or will be by steps begun, without the next block.
        known: of them those that T has a column of; fewer only while steps are unread.
        matvecs: products, of steps that were read and of others.
    """

    def __init__(
        self, op: Operator, rows: int, block: int, dtype: DTypeLike, seed: int, clock: Clock
    ) -> None:
        self.op = op
        self.block = block
        self.rows = rows
        self.clock = clock
        self.matvecs = 0
        self.restarts = 0
        self.asymmetry = 0.0
        self.used = self.known = 0
        self._seed = seed
        self._draws = 0
        self._largest = 0.0
        self._longest = 0.0
        # Columns of T as measured: what is below the diagonal blocks is zero.
        self._columns = np.zeros((rows, rows))
        self.coupling = np.zeros((block, 0))
        # Whether E holds all that couples the next block to the rows before it.
        self._coupling_known = True
        self.replaced = False
        self._like = jnp.zeros(block, jnp.int32)
        self.n = storage.Length(op.shape[0])
        with clock.part("orthogonalization"):
            shape = storage.shape(rows, self.n, dtype)
            self.basis = programs.empty_basis(clock, shape, dtype)
        # The next block, as it will be multiplied, if it need not be read from the basis.
        self._next: Array | None = None
        # Since the start: the cycles that ended, and the first row of the block that began this.
        self._cycles: list[Cycle] = []
        self._begin = 0
        # Steps begun, and, of those that were read, the blocks' rows and numbers.
        self._begun: collections.deque[_Begun] = collections.deque()
        self._read: collections.deque[tuple[int, Float64Array]] = collections.deque()
        self._ahead = int(on_device(op))
        self._step_seconds, self._last_read = math.inf, 0.0
        # Of products that were waited for alone, each of its block's vectors.
        self._product_seconds: list[float] = []

    def start(self, block: Array) -> None:
        """Begin with a block, which is consumed, or go on with one not of the recurrence.

        The latter, made orthogonal to the rows in use, and all that follow it couple to those rows
        by their residuals, which E does not hold.
        """
        with self.clock.part("orthogonalization"):
            self.basis, self._next, numbers = programs.orthonormalize(
                self.clock, self.basis, block, host(np.int32(self.used)), host(self._seeds(1))
            )
            _, _, info = programs.unpack(_on_host(numbers)[0], self.block)
        self._check_info(info, self.used - self.block)
        self.coupling = np.zeros((self.block, self.used))
        self._coupling_known = self.used == 0
        self._cycles, self._begin = [], self.used

    def random_block(self) -> Array:
        """A block of standard normal vectors, the next of the seed's sequence."""
        self._draws += 1
        seed, draw = seed_word(self._seed), np.uint32(self._draws)
        with self.clock.part("orthogonalization"):
            return programs.random_block(self.clock, self.op, self._like, host(seed), host(draw))

    @property
    def full(self) -> bool:
        """Whether a restart must come before another step is begun."""
        return self.used + 2 * self.block > self.rows

    @property
    def unread(self) -> int:
        """Products of steps that were begun and not yet taken into T."""
        return self.used - self.known

    def step(self, most: int) -> None:
        """Multiply the next block and extend the decomposition by it.

        Args:
            most: how many steps may be begun; 0 only while one is unread.
        """
        with self.clock.part("products"):
            while not self._read and len(self._begun) <= self._ahead and most and not self.full:
                most -= self._give(most)
            if not self._read:
                self._wait()
        self._take(*self._read.popleft())

    def _give(self, most: int) -> int:
        """Begin a step, or several in one program where they are short; return how many."""
        b, first, moment = self.block, self.used, time.perf_counter()
        block = self.load(first) if self._next is None else self._next
        self._next = None
        count = 1
        if self._ahead and self._step_seconds < _SHORT:
            room = (self.rows - self.used) // b - 1
            count = min(most, room, programs.TOGETHER, math.ceil(_SHORT / self._step_seconds))
        if count == 1:
            products = programs.multiply(self.clock, self.op, block)
            self.basis, self._next, numbers = programs.orthonormalize(
                self.clock, self.basis, products, host(np.int32(first + b)), host(self._seeds(1))
            )
        else:
            self.basis, self._next, numbers = programs.steps(
                self.clock, self.op, self.basis, block, host(np.int32(first)),
                host(self._seeds(count)), host(np.int32(count)),
            )  # fmt: skip
        self.used += b * count
        self._begun.append(_Begun(first, count, numbers, moment))
        return count

    def _wait(self) -> None:
        """Read the oldest of the steps that were given: the one wait for them."""
        begun = self._begun.popleft()
        rows = _on_host(begun.numbers)
        self._read += [(begun.first + i * self.block, rows[i]) for i in range(begun.steps)]
        now, since = time.perf_counter(), max(begun.moment, self._last_read)
        self._step_seconds = min(self._step_seconds, (now - since) / begun.steps)
        self._last_read = now

    def _take(self, old: int, numbers: Float64Array) -> None:
        """Extend T and E by the step that multiplied the block in the rows from `old`."""
        b = self.block
        measured, coupling, info = programs.unpack(numbers, b)
        self.matvecs += b
        self.known = m = old + b
        self._check_info(info, old)
        # Whose squares do not leave the range of float64.
        lengths = [math.hypot(*column) for column in np.concatenate([measured, coupling]).T]
        self._longest = max(self._longest, *lengths)
        check_range(self.op, self._longest)
        self.asymmetry = max(self.asymmetry, self._check_symmetry(measured, old))
        self._columns[:m, old:m] = measured[:m]
        self.coupling = np.zeros((b, m))
        self.coupling[:, old:] = coupling

    def forget_unread(self) -> None:
        """Leave out steps that were begun and not read; the rows before them are as they were."""
        self._begun.clear()
        self._read.clear()
        self._next = None
        self.used = self.known

    def _seeds(self, count: int) -> np.ndarray:
        """The seed of the next orthonormalisation, and of `count` in all."""
        first = self._draws + 1
        self._draws += count
        return np.asarray([seed_word(self._seed), first], np.uint32)

    def _check_info(self, info: Float64Array, multiplied: int) -> None:
        if not np.isfinite(info).all():
            number = self.matvecs
            if number == 0:
                raise FloatingPointError("v0 must be finite, got NaN or infinite entries")
            # Once more, to name the leaf; the rows of that block are still intact.
            report_nonfinite(self.op, self.multiply(self.load(multiplied)), number)
        self.replaced = bool(info[1] > 0)

    def load(self, start: int) -> Array:
        """The block `(b, n)` of vectors that the rows from `start` stand for."""
        return programs.load(self.clock, self.basis, host(np.int32(start)), self._like, self.n)

    def multiply(self, block: Array) -> Array:
        """The products of a block of its own, which is consumed; finished when this returns."""
        seconds = self.clock.seconds
        before = seconds["verification"]
        with self.clock.part("verification"):
            products = jax.block_until_ready(programs.multiply(self.clock, self.op, block))
        self.matvecs += len(products)
        self._product_seconds.append((seconds["verification"] - before) / len(products))
        return products

    def share_out_seconds(self, products: int) -> None:
        """Charge what is not the products' of the time of the steps to the orthogonalisation.

        A step waits for both at once. What a product takes is known from those of the verification,
        which were waited for alone.

        Args:
            products: how many the steps did.
        """
        if self._product_seconds:
            own = statistics.median(self._product_seconds) * products
            rest = max(self.clock.seconds["products"] - own, 0.0)
            self.clock.seconds["products"] -= rest
            self.clock.seconds["orthogonalization"] += rest

    def _check_symmetry(self, measured: Float64Array, old: int) -> float:
        """The relative difference between a measured column of T and what symmetry demands."""
        m = self.known
        scale = max(
            np.abs(self._columns[:old, :old]).max(initial=0),
            np.abs(measured).max(),
            np.abs(self.coupling).max(initial=0),
        )
        if not self._coupling_known or scale == 0:
            return 0.0
        within = np.abs(measured[old:m] - measured[old:m].T).max()
        across = np.abs(measured[:old] - self.coupling.T).max(initial=0)
        asymmetry = float(max(within, across) / scale)
        # Rows whose entries are all alike are longer or shorter by up to half of the spacing.
        if asymmetry > ASYMMETRY_LIMIT + 2 * float(jnp.finfo(self.basis.dtype).eps):
            raise ValueError(
                f"A must be symmetric: at product {self.matvecs} |uᵀAv − vᵀAu| is "
                f"{asymmetry:.2g} of the largest entry of the projected operator, for orthonormal "
                "u and v; if the operator is symmetric in exact arithmetic, its products are too "
                "inaccurate (dropout, resampled batches, low precision?)"
                f"{more_accurate(self.op)}"
            )
        return asymmetry

    @one_thread()
    def ritz(self) -> Ritz:
        """The Ritz pairs of the present projection."""
        with self.clock.part("host"):
            m = self.known
            values, vectors = np.linalg.eigh(self._columns[:m, :m], UPLO="U")
            self._largest = max(self._largest, float(np.abs(values).max()))
            residuals = np.linalg.norm(self.coupling @ vectors, axis=0)
            return Ritz(values, vectors, residuals, self._largest)

    def restart(self, ritz: Ritz, keep: np.ndarray) -> None:
        """Keep the Ritz pairs `keep`, in that order, as the first rows, and the next block.

        No step may be unread.
        """
        m, p, b = self.used, len(keep), self.block
        rotation = np.zeros((self.rows, self.rows))
        rotation[:m, :p] = ritz.vectors[:, keep]
        rotation[m : m + b, p : p + b] = np.eye(b)
        # It stays in the basis: what may follow, a verification, has better use for the memory.
        self._next = None
        with self.clock.part("orthogonalization"):
            self.basis = programs.rotate(
                self.clock, self.basis, host(rotation), host(np.int32(m + b)), host(np.int32(p + b))
            )
            jax.block_until_ready(self.basis)
        self._cycles = self._with_present(ritz)
        self._begin = p
        self._columns[:] = 0
        self._columns[range(p), range(p)] = ritz.values[keep]
        with one_thread():
            self.coupling = self.coupling @ ritz.vectors[:, keep]
        self.used = self.known = p
        self.restarts += 1

    @one_thread()
    def log_growth(self, mu: float, ritz: Ritz) -> float:
        """How much of an eigenvector of the eigenvalue `mu` has shown since the start."""
        return log_growth(mu, self._with_present(ritz))

    @one_thread()
    def _with_present(self, ritz: Ritz) -> list[Cycle]:
        begins = ritz.vectors[self._begin : self._begin + self.block]
        if not len(begins):
            return self._cycles
        return [*self._cycles, Cycle(ritz.values, self.coupling @ ritz.vectors, begins)]

    def drop(self, kept: int) -> None:
        """Forget all but the first rows, and the next block: `start` must follow."""
        self.used = self.known = kept
        self._columns[kept:, :] = 0
        self._columns[:, kept:] = 0


def _on_host(numbers: Array) -> Float64Array:
    """Where the host waits for the device in a step, once it has been given the next."""
    return np.asarray(numbers)
