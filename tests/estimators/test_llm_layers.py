"""Attention against MLP blocks of SmolLM2, through the example."""

import jax
import numpy as np
import pytest
from tests.test_examples import run

import curvax as cx


@pytest.fixture
def default_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.llm
@pytest.mark.usefixtures("default_promotion")
def test_smollm2_layers(monkeypatch, tmp_path, capsys):
    arguments = ("--probes", "8", "--layers", "0", "29", "--tol", "0.1", "--out", str(tmp_path))
    run("smollm2_layers.py", *arguments, monkeypatch=monkeypatch)
    print(capsys.readouterr().out)
    traces, values = (cx.load(tmp_path / f"{name}.npz") for name in ("traces", "eigenvalues"))
    # In the order of the stacked arrays.
    names = [f"layers.{i}.{kind}" for kind in ("attn", "mlp") for i in range(30)]
    assert list(traces) == names
    # Attention: query and output 576², key and value 576 × 192; MLP: three of 576 × 1536.
    assert [traces.sizes[names[i]] for i in (0, 30)] == [884_736, 2_654_208]
    assert list(values) == [names[i] for i in (0, 29, 30, 59)]
    for name, result in values.items():
        top = float(result.eigenvalues[0])
        # Of a positive semidefinite block: at most the trace, and at least its mean.
        assert result.all_converged and result.residuals[0] <= 0.1 * top
        low, high = traces[name].interval
        assert top <= high + result.residuals[0]
        assert top >= max(low, 0) / traces.sizes[name]
    # One compilation of the solver's programs per shape: that of the later layer takes none.
    assert values["layers.29.attn"].seconds["compile"] == 0
    assert values["layers.29.mlp"].seconds["compile"] == 0
    total = sum(result.estimate for result in traces.values())
    assert np.isfinite(total) and total > 0
    for name in ("traces.png", "eigenvalues.png"):
        assert (tmp_path / name).stat().st_size > 10_000
