"""The examples run, and print what they promise; some are tested with what they belong to."""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, monkeypatch):
    script = str(EXAMPLES / name)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")


def test_sharpness(monkeypatch, capsys):
    run("sharpness.py", "--steps", "5", "--rate", "0.2", monkeypatch=monkeypatch)
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "2 / rate = 10.0"
    table = [[float(cell) for cell in row.split()] for row in rows]
    assert [row[0] for row in table] == list(range(6))
    assert table[-1][1] < table[0][1]  # it trains
    assert all(row[3] <= 1e-3 * row[2] for row in table)  # every value is certified
    assert table[-1][4] < table[0][4]  # and a warm start saves products


def test_files(monkeypatch, capsys):
    with jax.numpy_rank_promotion("allow"):
        run("walkthrough_files.py", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "can run code on load" in out
    found = [float(line.split()[1]) for line in out.splitlines() if line.endswith("  yes")]
    # The post's six.
    posted = [76.840744, 1.3489572, 1.1418587, 0.1918977, -0.61654264, -1.1432382]
    np.testing.assert_allclose(found, posted, rtol=1e-5)


def test_every_example_is_tested():
    names = (
        "test_examples.py",
        "models/test_gpt.py",
        "krylov/test_llm.py",
        "estimators/test_llm_layers.py",
        "adapters/test_walkthroughs.py",
    )
    tests = "".join((Path(__file__).parent / name).read_text() for name in names)
    assert all(example.name in tests for example in EXAMPLES.glob("*.py"))
