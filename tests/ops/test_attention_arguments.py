"""What attention refuses, and what it says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.ops.attention_problems import as_dtype, make_problem

import curvax as cx


def arguments(rng, **changes):
    slots = as_dtype(make_problem(rng), jnp.float32)[0]
    return dict(zip(("query", "key", "value"), slots, strict=True)) | changes


Q, K = jnp.zeros((2, 9, 4, 5)), jnp.zeros((2, 11, 2, 5))
IDS = jnp.zeros((2, 9), jnp.int32)
ERRORS = [
    ({"query": Q[0, 0]}, ValueError, r"query must have shape \(B, T, N, H\) or .*, got \(4, 5\)"),
    ({"query": Q[..., :0]}, ValueError, r"query must have shape .* H > 0, got \(2, 9, 4, 0\)"),
    ({"query": Q.astype(int)}, TypeError, "query must be real and floating, got dtype int32"),
    ({"key": K[0]}, ValueError, r"key must have shape \(2, S, K, 5\) for query .*\(11, 2, 5\)"),
    ({"key": K[..., :4]}, ValueError, r"key must have shape \(2, S, K, 5\) .* got \(2, 11, 2, 4\)"),
    ({"key": K[:1]}, ValueError, r"key must have shape \(2, S, K, 5\) .* got \(1, 11, 2, 5\)"),
    (
        {"key": jnp.zeros((2, 11, 3, 5))},
        ValueError,
        "key must have a number of heads, axis 2, that divides the 4 of query, got 3",
    ),
    ({"key": K[:, :, :0]}, ValueError, "key must have a number of heads.* got 0"),
    ({"value": K[:, 1:]}, ValueError, r"value must have the shape of key, \(2, 11, 2, 5\), got"),
    ({"value": K.astype(jnp.bfloat16)}, ValueError, "value must have the dtype of query, float32"),
    ({"key": K.astype(jnp.float16)}, ValueError, "key must have the dtype of query.*got float16"),
    (
        {"query": np.zeros((2, 9, 4, 5))},
        ValueError,
        "query must be of 32 bits or less with JAX's 64-bit mode off, got float64: switch",
    ),
    ({"bias": np.zeros((1, 1))}, ValueError, "bias must be of 32 bits .* got float64"),
    ({"bias": jnp.zeros((9, 9))}, ValueError, r"bias .* \(B, N, T, S\) = \(2, 4, 9, 11\), got \(9"),
    ({"bias": jnp.zeros((1, 1, 1, 1, 1))}, ValueError, "bias must have a shape that broadcasts"),
    ({"bias": jnp.zeros((9, 11), int)}, TypeError, "bias must be real and floating"),
    ({"mask": jnp.zeros((9, 11))}, TypeError, "mask must be of dtype bool, got float32: .* a bias"),
    ({"mask": np.zeros((9, 11), int)}, TypeError, "mask must be of dtype bool, got int32"),
    ({"mask": jnp.zeros((2, 9, 11), bool)}, ValueError, r"mask must have a shape that broadcasts"),
    ({"query_seq_lengths": [9]}, ValueError, r"query_seq_lengths must have shape \(2,\), got \(1,"),
    ({"query_seq_lengths": [9, 10]}, ValueError, r"query_seq_lengths must be in \[0, 9\], got 10"),
    ({"key_value_seq_lengths": [-1, 2]}, ValueError, r"key_value_seq_.* in \[0, 11\], got -1"),
    ({"key_value_seq_lengths": [1.0, 2]}, TypeError, "key_value_seq_lengths must be integers"),
    ({"query_segment_ids": IDS}, ValueError, "key_value_segment_ids must be given where query_seg"),
    ({"key_value_segment_ids": IDS}, ValueError, "query_segment_ids must be given where key_v"),
    (
        {"query_segment_ids": IDS, "key_value_segment_ids": IDS},
        ValueError,
        r"key_value_segment_ids must have shape \(2, 11\), got \(2, 9\)",
    ),
    ({"local_window_size": -1}, ValueError, "local_window_size must be at least 0, got -1"),
    ({"local_window_size": (1, -2)}, ValueError, "local_window_size must be at least 0, got -2"),
    ({"local_window_size": (1, 2, 3)}, ValueError, r"local_window_size .* \(left, right\), got"),
    ({"local_window_size": 1.5}, TypeError, "local_window_size must be an integer, got 1.5"),
    ({"softcap": 0}, ValueError, "softcap must be positive or None, got 0"),
    ({"softcap": 1e300}, ValueError, r"softcap must be in .* float32, got 1e\+300"),
    ({"softcap": "1"}, TypeError, "softcap must be a number known when attention is traced"),
    ({"scale": jnp.ones(())}, TypeError, "scale must be a number known when attention is traced"),
    ({"scale": np.inf}, ValueError, "scale must be finite, got inf"),
    ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    ({"impl": "xla"}, ValueError, "impl must be one of .*'tiled'.*, got 'xla'"),
    ({"impl": None}, TypeError, "impl must be one of .*, got None"),
    ({"implementation": "cudnn"}, ValueError, "implementation must be one of .*, got 'cudnn'"),
    (
        {"impl": "tiled", "implementation": "tiled"},
        ValueError,
        "impl and implementation are one argument, got impl='tiled' and .*: leave one out",
    ),
    ({"window": 3}, TypeError, "dot_product_attention has no argument 'window'"),
]


@pytest.mark.parametrize("changes,kind,message", ERRORS)
def test_wrong_arguments(changes, kind, message, rng):
    with pytest.raises(kind, match=message):
        cx.nn.dot_product_attention(**arguments(rng, **changes))


def test_implementation_is_another_name_of_impl(rng):
    given = arguments(rng)
    dense = jax.make_jaxpr(
        lambda q: cx.nn.dot_product_attention(
            q, *list(given.values())[1:], implementation="reference"
        )
    )
    (eqn,) = [e for e in dense(given["query"]).jaxpr.eqns if e.primitive.name[:3] == "dot"]
    assert eqn.params["spec"].impl == "reference"


def test_lengths_that_are_traced_are_not_checked(rng):
    given = arguments(rng)
    run = jax.jit(lambda n: cx.nn.dot_product_attention(**given, query_seq_lengths=n))
    assert (run(jnp.array([3, 50]))[0, 3:] == 0).all()
