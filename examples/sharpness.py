"""Follow the sharpness, the largest Hessian eigenvalue, while a small network trains.

    python examples/sharpness.py [--steps 1000] [--rate 0.1]

Under full-batch gradient descent at a fixed learning rate the sharpness rises to about 2 / rate
and stays there (Cohen et al. 2021, "Gradient Descent on Neural Networks Typically Occurs at the
Edge of Stability"). Nothing is compiled again, and each solve starts from the last eigenvector.
"""

import argparse

import jax
import jax.numpy as jnp

import curvax as cx

WIDTH = 32


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Draw the parameters of a network with two hidden layers."""
    first, second, third = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(first, (4, WIDTH)) / 2,
        "second": jax.random.normal(second, (WIDTH, WIDTH)) / WIDTH**0.5,
        "third": jax.random.normal(third, (WIDTH, 1)) / WIDTH**0.5,
    }


def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    hidden = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
    return jnp.mean((hidden @ params["third"] - y) ** 2)


def main() -> None:
    """Train, and print loss, sharpness and products at regular steps."""
    parser = argparse.ArgumentParser(description="Follow the sharpness of a network in training.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.1)
    args = parser.parse_args()

    x = jax.random.normal(jax.random.key(0), (128, 4))
    batch = x, jnp.sin(2 * x[:, :1]) * x[:, 1:2]
    params = init(jax.random.key(1))

    @jax.jit
    def step(params):
        gradient = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - args.rate * g, params, gradient)

    print(f"2 / rate = {2 / args.rate:.1f}")
    print("step      loss  sharpness     bound  products")
    op, result = cx.hessian(loss, params, batch), None
    every = max(1, args.steps // 10)
    for i in range(args.steps + 1):
        if i % every == 0:
            op = op.at(params)
            result = cx.sharpness(op, result, tol=1e-3)
            value, bound = result.eigenvalues[0], result.bounds[0]
            products = result.num_matvecs + result.num_verification
            print(f"{i:4d}  {float(op.loss):8.4f}  {value:9.3f}  {bound:8.1e}  {products:8d}")
        params = step(params)


if __name__ == "__main__":
    main()
