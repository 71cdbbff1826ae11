"""Memory that products free stays with the process during a solve, and not after it."""

from __future__ import annotations

import contextvars
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import _native, heap

pytestmark = pytest.mark.skipif(bool(heap.reason_against()), reason=heap.reason_against())

ROOT = Path(__file__).parents[1]
LARGE = 100 << 20


def python(source, **environment):
    """What a program printed, of a process in which nothing was set before."""
    names = ("MALLOC_", "GLIBC_TUNABLES", "CURVAX_KEEP")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    result = subprocess.run(
        [sys.executable, "-c", "from tests.blocks_of_memory import mapped\n" + source],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


CONTEXTS = """
import threading, jax, jax.numpy as jnp, numpy as np
import curvax as cx
from curvax import heap
def look(v):
    print(int(mapped(100 << 20)))
    return v
op = cx.from_matvec(lambda v: jax.pure_callback(look, v, v), jnp.ones(3))
jax.block_until_ready(op @ jnp.ones(3))  # traced: an extra product
print("after")
def sees(): jax.block_until_ready(op @ jnp.ones(3))
sees()
with cx.keep_memory():
    sees()
    with heap.kept(): sees()
    sees()
sees()
for error in (ValueError, KeyboardInterrupt):
    try:
        with cx.keep_memory(): raise error
    except error: sees()
inside, outside = threading.Event(), threading.Event()
def work():
    with cx.keep_memory():
        inside.set()
        outside.wait(10)
thread = threading.Thread(target=work)
with cx.keep_memory():
    thread.start()
    assert inside.wait(10)
    sees()
outside.set()
thread.join()
sees()
"""


def test_contexts_end_with_the_last_of_all_threads_and_by_an_error():
    # In processes of their own here and below: an allocation that failed, as other tests have
    # them, moves a thread for good to an arena where blocks above 64 MiB are always mapped.
    nested, errors, threads = "10001", "11", "01"
    assert "".join(python(CONTEXTS)).partition("after")[2] == nested + errors + threads


def test_a_solve_does_not_compile_anew_for_what_another_thread_asks():
    inside, outside = threading.Event(), threading.Event()

    def work():
        with cx.keep_memory(False):
            inside.set()
            outside.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10) and heap.keeping()
    with cx.keep_memory(False):
        assert not heap.keeping()
    outside.set()
    thread.join()


# Each tells, within a product on the host of vectors of half a MB, how a block is taken: where
# the variable says 0, by default, after that, and where the context says no.
CALLS = """
import os, warnings, numpy as np
from scipy.sparse.linalg import LinearOperator
import curvax as cx
from curvax import program
program._LARGE = 0
warnings.simplefilter("ignore", cx.ConvergenceWarning)
calls = {
    "eigsh": lambda op: cx.eigsh(op, 1, max_basis=20, block_size=1),
    "power_iteration": lambda op: cx.power_iteration(op, max_matvecs=4),
    "sharpness": lambda op: cx.sharpness(op, tol=0.1),
    "solve": lambda op: cx.solve(op, np.ones(n)),
    "lanczos_tridiagonal": lambda op: cx.lanczos_tridiagonal(op, 5),
    "trace": lambda op: cx.trace(op, num_matvecs=6),
    "diagonal": lambda op: cx.diagonal(op, num_matvecs=6),
    "log_det": lambda op: cx.log_det(op, num_runs=2, num_steps=5),
    "spectral_density": lambda op: cx.spectral_density(op, num_runs=2, num_steps=5),
}
n = 1 << 17
values = np.arange(n, dtype=np.float32) % 40 + 1
seen = []
def matvec(v):
    seen.append(mapped(1 << 30))
    return values * v
op = LinearOperator((n, n), matvec=matvec, dtype=np.float32)
def run(call):
    seen.clear()
    call(op)
    assert len(seen) > 3 and len(set(seen)) == 1
    return str(int(seen[0]))
for name, call in calls.items():
    os.environ["CURVAX_KEEP_MEMORY"] = "0"
    found = run(call)
    del os.environ["CURVAX_KEEP_MEMORY"]
    found += run(call) + str(int(mapped(100 << 20)))
    with cx.keep_memory(False): found += run(call)
    print(name, found)
"""


def test_every_computation_keeps_it_and_gives_back():
    printed = python(CALLS)
    names, found = printed[::2], printed[1::2]
    assert len(names) == 9 and found == ["1011"] * 9, dict(zip(names, found, strict=True))


# Sizes below and above each threshold, before, in and after the context.
SETTINGS = {
    "none": ({}, {64 << 10: "000", 1 << 20: "100", 33 << 20: "101"}),
    "own variable": ({"MALLOC_MMAP_THRESHOLD_": "2000000"}, {1 << 20: "000", 3 << 20: "101"}),
    "tunable": (
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=0x100000:glibc.malloc.top_pad=4096"},
        {1 << 19: "000", 2 << 20: "101"},
    ),
    "no mapping": ({"MALLOC_MMAP_MAX_": "0"}, {1 << 20: "000", LARGE: "000"}),
    "more than an int": ({"MALLOC_TRIM_THRESHOLD_": "4294967296"}, {1 << 20: "101"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_had_set_is_set_again(name):
    environment, expected = SETTINGS[name]
    source = f"""
from curvax import heap
for size in {list(expected)}:
    found = [mapped(size)]
    with heap.keep_memory(), heap.unmapped(): found.append(mapped(size))
    print("".join(str(int(x)) for x in [*found, mapped(size)]))
"""
    # One process for each size, since the first context ends glibc's adjustment for good.
    for size, wanted in expected.items():
        assert python(source.replace(str(list(expected)), f"[{size}]"), **environment) == [wanted]


SOLVE = """
import resource, warnings, jax.numpy as jnp
import curvax as cx
warnings.simplefilter("ignore")
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
def loss(w, x):
    for _ in range(6):
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)
op = cx.hessian(loss, jnp.eye(32) + 0.01, jnp.ones((40000, 32)), linearize=False)
def solve(products):
    seen = []
    see = lambda progress: seen.append(faults())
    cx.eigsh(op, 1, tol=0, max_matvecs=products, max_basis=20, block_size=1, seed=0, callback=see)
    steady = [b - a for a, b in zip(seen[3:], seen[4:])]
    return sorted(steady)[len(steady) // 2]
with cx.keep_memory(False): print(solve(8))
solve(8)  # compiles
rss = resident()
with cx.keep_memory():
    print(solve(8))
    print(resident() - rss)
print(resident() - rss)
"""


def test_a_steady_product_faults_in_no_pages():
    plain, kept, peak, grown = map(int, python(SOLVE))
    assert plain > 4000 and kept <= 0.005 * plain
    # The temporary memory of one product, once.
    assert 30 << 20 < peak < 1.1 * 4096 * plain and grown < 8 << 20, (plain, peak, grown)


LOOP = """
import resource, jax, jax.numpy as jnp
import curvax as cx
from curvax.device.programs import empty_basis, multiply, solve_clock
def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(call())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def loss(w, x):
    for _ in range(6):
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)
op = cx.hessian(loss, jnp.eye(32) + 0.01, jnp.ones((40000, 32)), linearize=False)
large = jnp.ones((1000, 1000))
normalized = jax.jit(lambda v: v / jnp.linalg.norm(v) + 0 * jnp.sum(large @ large))
v = jnp.ones((32, 32))
block, clock = jnp.ones((1, 1024)), solve_clock()
with cx.keep_memory(False):
    multiply(clock, op, +block)
    print(faults(lambda: multiply(clock, op, block)))
with cx.keep_memory():
    multiply.work_bytes(clock, op, v.reshape(1, -1))  # compiles
    print(faults(lambda: multiply(clock, op, v.reshape(1, -1))))
with cx.keep_memory():
    op @ v
    # Of what is still being computed XLA would have the product wait in another thread.
    print(sorted(faults(lambda: op @ normalized(v)) for _ in range(9))[4])
empty_basis(clock, (1, 5), jnp.float32)
print(faults(lambda: empty_basis(clock, (8, 4 << 20), jnp.float32)))
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_products_of_a_users_loop_fault_in_no_pages_either():
    plain, _, steady, _ = map(int, python(LOOP))
    assert plain > 4000 and steady <= 0.005 * plain, (plain, steady)


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="a system without huge pages"
)
def test_what_stays_is_on_huge_pages():
    plain, first, _, basis = map(int, python(LOOP))
    assert first < 0.1 * plain, (plain, first)
    if _native.available("zeros"):
        assert basis < 0.1 * (128 << 20) / 4096, basis


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_another_allocator_is_left_alone_with_one_line(tmp_path):
    source = "extern void *__libc_malloc(unsigned long); void *malloc(unsigned long n)"
    (tmp_path / "other.c").write_text(source + " { return __libc_malloc(n); }\n")
    library = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    source = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
from curvax import heap
for _ in range(2):
    with heap.keep_memory(), heap.unmapped(): print(mapped(100 << 20))
"""
    printed = python(source, LD_PRELOAD=str(library))
    message = f"memory that products free cannot be kept: malloc is that of {library}".split()
    assert printed == [*message, "True", "True"]


def test_enabled_is_a_bool():
    with pytest.raises(TypeError, match="enabled must be True or False, got 1"), cx.keep_memory(1):
        pass


def test_the_variable_is_0_or_1(monkeypatch):
    monkeypatch.setenv("CURVAX_KEEP_MEMORY", "no")
    with pytest.raises(ValueError, match="CURVAX_KEEP_MEMORY must be 0 or 1, got 'no'"):
        cx.trace(np.eye(3, dtype=np.float32))


def test_it_changes_no_result():
    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    op = cx.hessian(loss, jnp.ones((8, 3)), jnp.eye(8))
    first = cx.eigsh(op, 2, seed=0)
    with cx.keep_memory():
        second = cx.eigsh(op, 2, seed=0)
    assert first.eigenvalues.tobytes() == second.eigenvalues.tobytes()


TRANSFORMED = {
    "jit": lambda op, v: jax.jit(lambda v: op @ v)(v),
    "jit of the operator": lambda op, v: jax.jit(lambda op, v: op @ v)(op, v),
    "grad": lambda op, v: jax.grad(lambda v: v @ (op @ v))(v) / 2,
    "jvp": lambda op, v: jax.jvp(lambda v: op @ v, (v,), (v,))[1],
    "vjp": lambda op, v: jax.vjp(lambda v: op @ v, v)[1](v)[0],
    "vmap": lambda op, v: jax.vmap(lambda v: op @ v)(jnp.stack([v, v]))[1],
    "loop": lambda op, v: jax.lax.fori_loop(0, 1, lambda _, v: op @ v, v),
    "checkpoint": lambda op, v: jax.jit(jax.checkpoint(lambda v: op @ v))(v),
    "at": lambda op, v: jax.jit(lambda p, v: op.at(p) @ v)(jnp.linspace(0.1, 1, 12), v),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("how", TRANSFORMED)
def test_products_are_transformed_within_it(how, x64):
    with jax.enable_x64(x64):
        p, v = jnp.linspace(0.1, 1, 12), jnp.ones(12)
        op = cx.hessian(lambda p, b: jnp.sum((b @ p) ** 4), p, jnp.eye(12, dtype=p.dtype))
        with cx.keep_memory():
            found = TRANSFORMED[how](op, v)
            seen = []
            cx.eigsh(
                op, 1, seed=0, max_basis=6, callback=lambda _: seen.append(TRANSFORMED[how](op, v))
            )
            outer = cx.from_matvec(lambda v: TRANSFORMED[how](op, v), v)
            top = cx.eigsh(outer, 1, seed=0, max_basis=6).eigenvalues
    for product in (found, *seen):
        np.testing.assert_allclose(product, 12 * np.asarray(p) ** 2, rtol=1e-5)
    np.testing.assert_allclose(top, 12, rtol=1e-5)


CACHED = """
import logging, jax, jax.numpy as jnp
from curvax import heap
import curvax as cx
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
op = cx.hessian(lambda w, x: jnp.sum((x @ w) ** 4), jnp.ones(600), jnp.ones((700, 600)))
print(heap.keeping())
cx.eigsh(op, 1, seed=0, max_basis=20, block_size=1)
with cx.keep_memory(): print(heap.keeping())
"""


def test_programs_are_written_to_a_persistent_cache(tmp_path):
    assert python(CACHED) == ["True", "True"]
    assert python(CACHED, JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == ["False", "True"]
    assert any("multiply" in entry.name for entry in tmp_path.iterdir())


def test_a_generator_may_end_in_another_context():
    def generator():
        with cx.keep_memory():
            yield heap.within()

    ended = generator()
    assert contextvars.copy_context().run(next, ended)
    assert next(ended, None) is None and not heap._heap.solves and not heap.within()
    left = generator()
    assert next(left)
    del left
    assert not heap._heap.solves and not heap.within()


def test_an_interrupt_anywhere_ends_it():
    """Ctrl-C at each line of the file in turn."""
    lines = stop = 0

    def tracer(frame, event, argument):
        nonlocal lines
        names, outer = set(), frame
        while outer is not None:
            names.add(outer.f_code.co_name)
            outer = outer.f_back
        # An exception out of `__del__` is not raised.
        if frame.f_code.co_filename != heap.__file__ or "__del__" in names:
            return None
        if event == "line":
            lines += 1
            if lines == stop:
                raise KeyboardInterrupt
        return tracer

    def interrupted():
        nonlocal lines
        lines, before = 0, sys.gettrace()
        sys.settrace(tracer)
        try:
            with cx.keep_memory(), heap.unmapped():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    assert not interrupted()
    total = lines
    assert total > 40
    for stop in range(1, total + 1):  # noqa: B007
        assert interrupted()
        assert not heap._heap.solves and not heap._heap.programs and not heap.within(), stop
        heap._wanted.set(None)
