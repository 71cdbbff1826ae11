"""Compiled device programs, and the clock that times the parts of a computation."""

import abc
import collections
import contextlib
import contextvars
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.stages import Compiled

from curvax.heap import keeping, unmapped, within
from curvax.jax_internals import backends
from curvax.typing import PyTree


def present() -> frozenset[str]:
    """Platforms that JAX has devices of.

    Raises:
        ValueError: JAX has none of those that it was told to use.
    """
    try:
        return frozenset(backends())
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        if not asked:
            raise
        raise ValueError(
            f"JAX_PLATFORMS must name platforms that JAX can start here, got {asked!r}: "
            f"{str(error) or 'there is no such device'}. For 'cuda' install JAX's plugin, "
            'pip install "jax[cuda13]", and see that nvidia-smi lists a device; JAX_PLATFORMS=cpu '
            "uses the CPU, and without the variable JAX chooses"
        ) from error


def traced(*values: object) -> bool:
    """Whether a value is traced, or what is computed here would be; starts JAX's platforms."""
    present()
    # Under jit every new array is a tracer; under vmap and grad only what is mapped.
    leaves = jax.tree.leaves((values, jnp.zeros(())))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def default_platform() -> str:
    """The platform of JAX's default device: `"cpu"`, `"gpu"` or another's name."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        present()
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Clock:
    """Wall seconds by part, without counting a nested part twice."""

    def __init__(self, *parts: str) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("compile", *parts), 0.0)
        self._started = time.perf_counter()
        self._nested = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, less what nested parts charge."""
        outer, self._nested = self._nested, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] += spent - self._nested
            self._nested = outer + spent

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    def parts(self) -> dict[str, float]:
        """Seconds by part, and their `total`: the field `seconds` of results."""
        return {**self.seconds, "total": self.total()}


_users_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("users_mode")
_cache: collections.OrderedDict[Hashable, "_Ready"] = collections.OrderedDict()
_CACHED = 32


def _kept(cache: collections.OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What the cache has for the key, or else what is made; the last `_CACHED` used are kept."""
    # Taken out and put back, not moved: another thread may have dropped it in between.
    found = cache.pop(key, None)
    if found is None:
        found = make()
    cache[key] = found
    while len(cache) > _CACHED:
        cache.popitem(last=False)
    return found


# JAX traces it anew where a setting is another one that its traces depend on (64-bit mode, the
# precision of products, the default device, a mesh), and else returns the trace that it has.
_nothing = jax.jit(lambda: ())


class Argument(abc.ABC):
    """Part of an argument, a pytree, of which compiled programs need less than is there.

    What they do not need would keep programs apart that are the same, and be kept with them.
    """

    @abc.abstractmethod
    def as_argument(self) -> PyTree:
        """What a program needs, for one that is run rather than differentiated."""


def as_arguments(args: PyTree) -> PyTree:
    """A pytree with what compiled programs need of it; as it is, where anything in it is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        return args
    return jax.tree.map(
        lambda part: part.as_argument() if isinstance(part, Argument) else part,
        args,
        is_leaf=lambda part: isinstance(part, Argument),
    )


def untracked_settings() -> tuple[Hashable, ...]:
    """The settings that a trace depends on, and that JAX does not keep its traces apart by.

    The default random generator, and the environment variable CURVAX_IMPL.
    """
    generator = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
    return generator, os.environ.get("CURVAX_IMPL")


def _settings() -> tuple[Hashable, ...]:
    """All settings that a compiled program depends on, as a key."""
    return _nothing.trace().jaxpr, untracked_settings()


def _placement(leaves: list[Any]) -> Hashable:
    """Where arguments lie, as a key; arrays that are not bound to a device follow the others."""
    bound = [leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)]
    devices = frozenset().union(*(sharding.device_set for sharding in bound))
    if len(devices) <= 1:
        return devices
    return tuple(leaf.sharding if getattr(leaf, "committed", False) else None for leaf in leaves)


# jaxlib 0.10.2 mistranslates rare float64 programs for vectors of more than 128 bits, in silence: a
# Hessian of mean((concatenate([x, x²], -1) - t)²), with x of shape (4, 5), was off by 12 %.
_NARROW: dict[str, Any] = {"xla_cpu_prefer_vector_width": 128}


def compiler_options(*args: object) -> dict[str, Any] | None:
    """XLA's options for a program of these arguments; only an outermost `jit` may have any."""
    wide = any(getattr(leaf, "dtype", None) == np.float64 for leaf in jax.tree.leaves(args))
    return _NARROW if wide else None


def _memory_stays(placed: Hashable) -> bool:
    """Whether what a program of arguments placed so frees is used again; see `curvax.heap`."""
    # A callback in a program for several devices would have to be placed on one of them.
    return keeping() and present() == {"cpu"} and isinstance(placed, frozenset)


def _in_the_callers_thread(fun: Callable[P, R]) -> Callable[P, R]:
    """The same function, as a program that runs in the thread that calls it.

    XLA:CPU does so with programs that have callbacks, lest these wait for each other, and takes any
    thread of a pool for the rest. This callback is not in the compiled program: its branch is dead.
    """

    def with_callback(*args: P.args, **named: P.kwargs) -> R:
        jax.lax.cond(False, lambda: io_callback(lambda: None, None), lambda: None)
        return fun(*args, **named)

    return with_callback


def _reused(args: PyTree, nbytes: int = 0) -> contextlib.AbstractContextManager[None]:
    """Around a program `_in_the_callers_thread`, which takes that much memory."""
    # XLA would run it in a thread of its own once what is still being computed is ready.
    jax.block_until_ready(args)
    return unmapped(nbytes)


def jit(fun: Callable[P, R], *, static: int) -> Callable[P, R]:
    """`jax.jit` with `compiler_options` where it is outermost, that keeps the programs last used.

    JAX would keep thousands, in a loop over losses that differ in a number, say.

    Args:
        fun: the function.
        static: the position of its static argument.
    """
    programs: collections.OrderedDict[Hashable, Callable[P, R]] = collections.OrderedDict()

    @functools.wraps(fun)
    def call(*args: P.args, **named: P.kwargs) -> R:
        leaves, structure = jax.tree.flatten((args, named))
        options, here = compiler_options(leaves), within()
        # Within a trace a new array is traced too, whatever the arguments are.
        if (options is not None or here) and traced(leaves):
            options, here = None, False
        here = here and _memory_stays(_placement(leaves))

        def make() -> Callable[P, R]:
            called = _in_the_callers_thread(fun) if here else fun
            # A function of its own, with which JAX drops what it has compiled for it.
            fresh = functools.wraps(fun)(lambda *args, **named: called(*args, **named))
            return jax.jit(fresh, static_argnums=static, compiler_options=options)

        run = _kept(programs, (structure, here, *(options or ())), make)
        with _reused(leaves) if here else contextlib.nullcontext():
            return run(*args, **named)

    return call


class _Ready(NamedTuple):
    """A compiled program, and what a run of it allocates."""

    run: Compiled
    work_bytes: int


# From where on a program is worth the 50 microseconds of `unmapped`: it may take blocks that glibc
# would map each time, in `kept` those above 32 MiB.
_LARGE = 16 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Program(Generic[P, R]):
    """A function, compiled once per structure, types and devices of its arguments, and settings.

    Operators in them are compared by what they compute: those of one loss share what is compiled.

    Compiled ahead of time, so that compilation is timed apart and the memory can be read before
    a run; under `jax.disable_jit()` too, which has no such programs.

    Attributes:
        fun: the function.
        donate: the arguments whose memory the results take over.
        wide: whether it is traced and run under JAX's 64-bit mode, whatever the user has set.
        check: called with the arguments before a run, to refuse them.
        lasting: whether its results outlive the computation that it is part of, and so should not
            lie among memory that is used again.
    """

    fun: Callable[P, R]
    donate: tuple[int, ...] = ()
    wide: bool = False
    check: Callable[..., object] | None = None
    lasting: bool = False

    def __call__(self, clock: Clock, *args: P.args, **named: P.kwargs) -> R:
        """Run; the arrays of the donated arguments are gone after it.

        Raises:
            TypeError: an argument by its name: `donate` counts places.
        """
        if named:
            raise TypeError(f"a device program takes no argument by name, got {sorted(named)}")
        if self.check is not None:
            self.check(*args)
        needed = as_arguments(args)
        with self._mode():
            ready = self._ready(clock, needed)
            reused = ready.work_bytes >= _LARGE and not self.lasting and within()
            if not reused:
                return ready.run(*needed)
            with _reused(needed, ready.work_bytes):
                # What is left to the threads of a pool is waited for: it takes memory too.
                return jax.block_until_ready(ready.run(*needed))

    def work_bytes(self, clock: Clock, *args: object) -> int:
        """What a run allocates beside its arguments: scratch, and results not in donated memory.

        Args:
            clock: charged for the compilation, which a later run does not repeat.
            args: arrays, or `jax.ShapeDtypeStruct`s in their place.
        """
        with self._mode():
            return self._ready(clock, as_arguments(args)).work_bytes

    def known_work_bytes(self, *args: object) -> int | None:
        """The same, if the program has been compiled for these arguments, else None."""
        with self._mode():
            ready = _cache.get(self._key(as_arguments(args)))
        return None if ready is None else ready.work_bytes

    def result_shardings(self, clock: Clock, *args: object) -> PyTree:
        """How each result lies on the devices; the arguments are those of `work_bytes`."""
        with self._mode():
            return self._ready(clock, as_arguments(args)).run.output_shardings

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        own = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        token = _users_mode.set(own)
        try:
            with jax.disable_jit(False), jax.enable_x64(self.wide or own):
                yield
        finally:
            _users_mode.reset(token)

    def _key(self, args: tuple[object, ...]) -> Hashable:
        leaves, treedef = jax.tree.flatten(args)
        types = tuple(
            (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves
        )
        placed = _placement(leaves)
        settings = _users_mode.get(), _memory_stays(placed), _settings()
        return self, treedef, types, placed, settings

    def _ready(self, clock: Clock, args: tuple[object, ...]) -> _Ready:
        def make() -> _Ready:
            stays = _memory_stays(_placement(jax.tree.leaves(args)))
            called = _in_the_callers_thread(self.fun) if stays else self.fun
            # A function of its own, since JAX would return what it has traced under other settings.
            fresh = functools.wraps(self.fun)(lambda *args: called(*args))  # type: ignore[call-arg]
            with clock.part("compile"):
                lowered = jax.jit(fresh, donate_argnums=self.donate).lower(*args)
                compiled = lowered.compile(compiler_options(*args))
            return _Ready(compiled, _work_bytes(compiled))

        return _kept(_cache, self._key(args), make)


def _work_bytes(compiled: Compiled) -> int:
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes + results)


def host(value: np.ndarray | np.generic) -> Any:
    """Numbers on the host as an argument of a program, which takes them as if they were JAX's."""
    return value


def users_mode() -> contextlib.AbstractContextManager[None]:
    """Within the trace of a wide program: the 64-bit mode that the user has set, as a context."""
    return jax.enable_x64(_users_mode.get())


def program(
    *,
    donate: tuple[int, ...] = (),
    wide: bool = False,
    check: Callable[..., object] | None = None,
    lasting: bool = False,
) -> Callable[[Callable[P, R]], Program[P, R]]:
    """Turn a function into a `Program` with these options."""
    return lambda fun: Program(fun, donate, wide, check, lasting)
