"""The walkthroughs of `examples/`, each in a process of its own, as its readers run it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.frameworks
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *needed):
    for module in needed:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    options = ["-W", "error", "-W", "ignore:__array__:DeprecationWarning"]
    # Beside JAX's threads, torch's make both ten times slower.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, *options, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pairs(text):
    """Eigenvalues, and whether each converged."""
    rows = re.findall(r"^ +-?\d+ +(-?[\d.]+)(?: +\S+)+ +(yes|NO)$", text, re.MULTILINE)
    assert rows
    return [float(value) for value, _ in rows], all(mark == "yes" for _, mark in rows)


def difference(text):
    """Of the Hessian-vector products, the largest."""
    return max(map(float, re.findall(r"Hessian-vector product ([\d.e+-]+)", text)))


def test_pytorch():
    text = run("walkthrough_pytorch.py", "torchax", "sklearn")
    values, converged = pairs(text)
    assert converged and difference(text) <= 1e-5
    assert values[:4] == sorted(values[:4], reverse=True) and values[3] > 0 > values[5]
    np.testing.assert_allclose(values[-2:], [100, 99], rtol=1e-3)


def test_huggingface():
    text = run("walkthrough_huggingface.py", "torchax", "transformers")
    assert pairs(text)[1] and difference(text) <= 1e-5
    assert "model.embed_tokens.weight" in text and "over 2 microbatches" in text
    assert "layer 0" in text and "layer 1" in text


def test_keras():
    text = run("walkthrough_keras.py", "keras", "sklearn")
    values, converged = pairs(text)
    assert converged and difference(text) <= 1e-2
    assert values[-1] == pytest.approx(values[0], rel=1e-3)  # the one from the file


def test_flax():
    text = run("walkthrough_flax.py", "flax", "sklearn")
    assert pairs(text)[1] and difference(text) <= 1e-2


def test_equinox():
    text = run("walkthrough_equinox.py", "equinox", "sklearn")
    assert pairs(text)[1] and difference(text) <= 1e-2


def numbers(text):
    """Of the NumPy array that ends in "]"."""
    inside = re.search(r"\[([^\[\]]*)\]\s+\(9, 6\)", text).group(1)
    return [float(number) for number in inside.split()]


def test_the_posts_pytorch_example():
    """`hessian_post_pytorch.py`: trained in torch, it has the post's six eigenvalues."""
    text = run("hessian_post_pytorch.py", "torch")
    posted = [-1.1432382, -0.61654264, 0.1918977, 1.1418587, 1.3489572, 76.840744]
    assert "Epoch 10, Loss: 1.7286" in text
    np.testing.assert_allclose(numbers(text), posted, rtol=1e-5)


def test_the_posts_tensorflow_example():
    """`hessian_post_keras.py`, against a dense Hessian in float64 of the parameters it trained."""
    for module in ("keras",):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    ending = (
        "\nimport json, jax"
        "\njax.config.update('jax_enable_x64', True)"
        "\nwide = jax.tree.map(np.float64, params)"
        "\nloss = generate_MSE_loss_func(wide, X_np.astype(float), Y_np.astype(float), "
        "forward_copy_tf)"
        "\nflat = jax.flatten_util.ravel_pytree(wide)[0]"
        "\nprint(json.dumps(np.asarray(jax.hessian(loss)(flat)).tolist()))\n"
    )
    code = (EXAMPLES / "hessian_post_keras.py").read_text() + ending
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, dense = done.stdout.rstrip().rsplit("\n", 1)
    values = np.linalg.eigvalsh(np.array(json.loads(dense), np.float64))
    wanted = np.sort(values[np.argsort(-np.abs(values))[:6]])
    np.testing.assert_allclose(numbers(text), wanted, rtol=1e-5, atol=1e-5 * abs(values).max())
