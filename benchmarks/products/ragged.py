"""500 batches of 57 lengths, beside 500 of their mean length: from the data to eigenvalues.

    python -m benchmarks.products.ragged [--repeats 5] [--json FILE]

A network of three layers on batches of 8 to 64 samples. Each figure is of the operator and its top
5 together, compilation included; Hessian, Gauss-Newton and Fisher matrix in turn, in a process for
each side. In "pieces" a `microbatch_size` says that the loss is a mean over
samples; "whole" has none, and compiles each length, of the Hessian alone. So do "sequences" of 57
lengths, which cannot be cut, beside sequences of one.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.lib.processes import main, run_case

import curvax as cx

COUNT, SHORTEST, LONGEST = 500, 8, 64
KINDS = ("hessian", "ggn", "fisher")
LOSS = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def _forward(params: Any, batch: Any) -> jax.Array:
    hidden = jax.nn.gelu(batch[0] @ params["w1"] + params["b1"])
    hidden = jax.nn.gelu(hidden @ params["w2"] + params["b2"])
    return hidden @ params["w3"]


def _loss(params: Any, batch: Any) -> Any:
    return LOSS(_forward(params, batch), batch)


def _params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 64), "b1": (64,), "w2": (64, 64), "b2": (64,), "w3": (64, 10)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for name, shape in shapes.items()
    }


def _lengths(rng: np.random.Generator, ragged: bool) -> np.ndarray:
    """Every length once at least, or the mean of all."""
    once = np.arange(SHORTEST, LONGEST + 1)
    rest = rng.integers(SHORTEST, LONGEST + 1, COUNT - len(once))
    lengths = rng.permutation(np.concatenate([once, rest]))
    return lengths if ragged else np.full(COUNT, round(lengths.mean()))


def _batches(seed: int, ragged: bool, shape: tuple[int, ...] = ()) -> list[Any]:
    """Of samples, or with a `shape` of so many sequences of such a length."""
    rng = np.random.default_rng(seed)
    sizes = [(*shape, length) for length in _lengths(rng, ragged).tolist()]
    return [
        (rng.standard_normal((*size, 32)).astype(np.float32), rng.integers(0, 10, size))
        for size in sizes
    ]


def _timed(kind: str, batches: list[Any], microbatch_size: int | None) -> dict[str, float]:
    params = _params()
    start = time.perf_counter()
    if kind == "hessian":
        op: Any = cx.hessian(_loss, params, batches, microbatch_size=microbatch_size)
    else:
        make = cx.ggn if kind == "ggn" else cx.fisher
        op = make(_forward, LOSS, params, batches, microbatch_size=microbatch_size)
    made = time.perf_counter()
    jax.block_until_ready(op @ params)
    first = time.perf_counter()
    laters = []
    for _ in range(9):
        begin = time.perf_counter()
        jax.block_until_ready(op @ params)
        laters.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    cx.eigsh(op, 5, seed=0)
    solved = time.perf_counter() - begin
    return {
        "operator": made - start,
        **{f"operator: {part}": spent for part, spent in op.seconds.items()},
        "first product": first - made,
        "later product": float(np.median(laters)),
        "top 5": solved,
        "seconds": made - start + solved,
        "programs of a loss": len(op.stacks),
    }


def _side(
    seed: int, ragged: bool, size: int | None, kinds: tuple[str, ...], shape: tuple[int, ...] = ()
) -> dict[str, Any]:
    batches = _batches(seed, ragged, shape)
    # What JAX compiles once in any process is no part of a side.
    cx.eigsh(cx.hessian(_loss, _params(), batches[0]), 5, seed=0)
    found: dict[str, Any] = {kind: _timed(kind, batches, size) for kind in kinds}
    return {**found, "seconds": sum(own["seconds"] for own in found.values())}


CASES = {
    "equal": lambda number, seed: _side(seed, False, None, KINDS),
    "pieces": lambda number, seed: _side(seed, True, LONGEST, KINDS),
    "whole": lambda number, seed: _side(seed, True, None, ("hessian",)),
    "equal sequences": lambda number, seed: _side(seed, False, None, ("hessian",), (2,)),
    "sequences": lambda number, seed: _side(seed, True, None, ("hessian",), (2,)),
}


def compare(repeats: int) -> dict[str, Any]:
    """Ratios to equal batches, medians over the processes; of what compiles each length, once."""
    module = "benchmarks.products.ragged"
    rounds = [
        {side: run_case(module, side, 0, seed) for side in ("equal", "pieces")}
        for seed in range(repeats)
    ]
    once = {side: run_case(module, side, 0, 0) for side in CASES if side not in rounds[0]}

    def ratio(kind: str, part: str) -> float:
        return float(np.median([r["pieces"][kind][part] / r["equal"][kind][part] for r in rounds]))

    ratios = {f"{kind}: pieces / equal (target <= 3)": ratio(kind, "seconds") for kind in KINDS}
    ratios |= {f"{kind}, a later product": ratio(kind, "later product") for kind in KINDS}
    ratios["hessian: whole / equal"] = (
        once["whole"]["seconds"] / rounds[0]["equal"]["hessian"]["seconds"]
    )
    ratios["hessian: sequences / equal ones"] = (
        once["sequences"]["seconds"] / once["equal sequences"]["seconds"]
    )
    return {"rounds": rounds, "once": once, "ratios": ratios}


if __name__ == "__main__":
    main(__doc__ or "", CASES, compare, repeats=5)
