"""Train the byte-level GPT that `curvax demo` analyses, on the running Python's own documentation.

    python examples/train_demo_gpt.py [--out python/curvax/models] [--steps 400]

The corpus is `pydoc_data.topics`, so the bytes, and with them the weights, depend on the Python
version; the shipped files were made with the version recorded in `gpt.json`. Needs `optax`.
"""

import argparse
import json
import platform
from pathlib import Path
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from curvax.models import gpt

BATCH = 16


def corpus() -> np.ndarray:
    """The documentation topics, in name order, as bytes."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return np.frombuffer(text.encode(), np.uint8)


def windows(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`BATCH` random windows of `CONTEXT + 1` bytes."""
    starts = rng.integers(0, len(data) - gpt.CONTEXT - 1, BATCH)
    return np.stack([data[s : s + gpt.CONTEXT + 1] for s in starts])


def main() -> None:
    """Train, then write `gpt.npz` and `gpt.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("python/curvax/models"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    data, rng = corpus(), np.random.default_rng(0)
    params = gpt.init(jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps, 3e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(gpt.loss)(params, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for i in range(args.steps):
        params, state, value = step(params, state, jnp.asarray(windows(data, rng)))
        if i % 50 == 0 or i == args.steps - 1:
            print(f"step {i:4d}  loss {float(value):.4f} nats/byte", flush=True)

    flat, _ = ravel_pytree(params)
    batch = windows(data, np.random.default_rng(1))
    stored = np.asarray(flat).astype(np.float16)
    final = gpt.loss(jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params), batch)
    np.savez_compressed(args.out / "gpt.npz", parameters=stored, batch=batch)
    facts = {
        "parameters": int(stored.size),
        "steps": args.steps,
        "loss_on_shipped_batch": round(float(final), 6),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    (args.out / "gpt.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
