"""Time the head of a language model: hidden states to cross entropy, and its Hessian products.

    python -m benchmarks.products.head [--repeats 7] [--json benchmarks/baselines/head.json]

1024 tokens, width 256, 50,304 classes, default chunks; all programs interleaved in one process
with 2 threads; medians. The materialised form is the plain jnp loss under `jit(jvp(grad))`. The
memory of larger shapes is what the compiler says of the program, which is not run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from benchmarks.lib.compiled import compile_program, median_seconds, relative_difference
from benchmarks.lib.facts import machine_facts, publish

from curvax import losses

SHAPE = (1024, 256, 50304)
LARGE = {"16384 x 768 x 50304": (16384, 768, 50304), "8192 x 2304 x 256000": (8192, 2304, 256000)}


def ours(slots: Any, labels: Any) -> Any:
    return losses.linear_cross_entropy(*slots, labels)


def behind_a_layer(slots: Any, labels: Any) -> Any:
    """A product needs the gradient in the hidden states, as every model makes it."""
    return losses.linear_cross_entropy(jnp.tanh(slots[0]), slots[1], labels)


def materialised(slots: Any, labels: Any) -> Any:
    logits = slots[0] @ slots[1].T
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def hvp(loss: Callable[..., Any]) -> Callable[..., Any]:
    def product(slots: Any, labels: Any, tangents: Any) -> Any:
        return jax.jvp(lambda s: jax.grad(loss)(s, labels), (slots,), (tangents,))[1]

    return product


def linear_half(loss: Callable[..., Any], slots: Any, labels: Any) -> Any:
    return jax.jit(lambda s, y: jax.linearize(lambda t: jax.grad(loss)(t, y), s)[1])(slots, labels)


def timings(repeats: int) -> dict[str, Any]:
    rows, width, vocab = SHAPE
    keys = jax.random.split(jax.random.key(0), 5)
    scale = width**-0.5
    slots = (
        jax.random.normal(keys[0], (rows, width)),
        scale * jax.random.normal(keys[1], (vocab, width)),
    )
    labels = jax.random.randint(keys[2], (rows,), 0, vocab)
    four = (
        jax.random.normal(keys[3], (4, rows, width)),
        scale * jax.random.normal(keys[4], (4, vocab, width)),
    )
    one = jax.tree.map(lambda x: x[0], four)
    linear = linear_half(ours, slots, labels)
    deeper = linear_half(behind_a_layer, slots, labels)
    product = hvp(ours)
    compiled = {
        "materialised": compile_program(hvp(materialised), slots, labels, one),
        "linear_cross_entropy": compile_program(product, slots, labels, one),
        "b=4": compile_program(jax.vmap(product, (None, None, 0)), slots, labels, four),
        "linearised": compile_program(lambda half, v: half(v), linear, one),
        "linearised, b=4": compile_program(lambda half, v: jax.vmap(half)(v), linear, four),
        "behind a layer": compile_program(hvp(behind_a_layer), slots, labels, one),
        "behind a layer, linearised": compile_program(lambda half, v: half(v), deeper, one),
        "one product hidden @ head.T": compile_program(lambda s: s[0] @ s[1].T, slots),
    }
    programs = {name: program for name, (program, _) in compiled.items()}
    reference, got = programs["materialised"](), programs["linear_cross_entropy"]()
    seconds = median_seconds(programs, repeats)
    single, cached = seconds["linear_cross_entropy"], seconds["linearised"]
    return {
        "shape": SHAPE,
        "seconds": seconds,
        "relative_difference": [
            relative_difference(a, b) for a, b in zip(got, reference, strict=True)
        ],
        "ratios": {
            "to the materialised form (target <= 0.8)": single / seconds["materialised"],
            "per tangent, b=4 to b=1 (target <= 0.88)": seconds["b=4"] / 4 / single,
            "per tangent, linearised (target <= 0.95)": seconds["linearised, b=4"] / 4 / cached,
            "linearised to not, a head alone (FLOP count: 1)": cached / single,
            "linearised to not, behind a layer (FLOP count: 0.875)": seconds[
                "behind a layer, linearised"
            ]
            / seconds["behind a layer"],
        },
    }


def memory() -> dict[str, Any]:
    def bytes_of(loss: Callable[..., Any], rows: int, width: int, vocab: int) -> int:
        slots = tuple(jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (rows, vocab))
        labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
        compiled = jax.jit(hvp(loss)).lower(slots, labels, slots).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    return {
        name: {kind.__name__: bytes_of(kind, *shape) / 1e9 for kind in (ours, materialised)}
        for name, shape in LARGE.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {
        "machine": machine_facts(),
        "time": timings(args.repeats),
        "temporary_gigabytes": memory(),
    }
    publish(report, args.json)


if __name__ == "__main__":
    main()
