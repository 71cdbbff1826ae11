"""Attention's output, gradient and Hessian products against plain JAX in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.ops.attention_problems import (
    EPS,
    as_dtype,
    assert_close,
    derivatives,
    make_problem,
    ours,
    true_derivatives,
    truth,
)

from curvax.ops.attention import Options, tiles

TOLERANCE = 1e-5


@pytest.fixture(params=["tiled", "reference"])
def impl(request):
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Of at most 4 queries or keys, and of few heads at a time."""
    monkeypatch.setattr(tiles, "_ON_CPU", (4, 64))


@pytest.mark.parametrize(
    "tokens,width",
    [(1, 7), (1, 64), (2, 1), (2, 80), (7, 64), (63, 7), (129, 1), (129, 80), (300, 64)],
)
def test_sizes(tokens, width, rng):
    problem = make_problem(rng, 1, tokens, tokens, 4, 2, width, bias=(1, 4, 1, tokens))
    options = {"is_causal": tokens % 2 == 1}
    got = derivatives(ours("tiled"), options)(*as_dtype(problem, jnp.float32))
    assert_close(got, true_derivatives(problem, options), TOLERANCE)


IDS = np.array([[0] * 4 + [1] * 3 + [2] * 4, [1] * 6 + [0] * 5])
OPTIONS = {
    "causal": {"is_causal": True},
    "window": {"local_window_size": 2},
    "one-sided": {"local_window_size": (3, 0)},
    "queries": {"query_seq_lengths": np.array([9, 5])},
    "keys": {"key_value_seq_lengths": np.array([7, 11])},
    "segments": {"query_segment_ids": IDS[:, :9], "key_value_segment_ids": IDS},
    "mask": {"mask": np.random.default_rng(0).random((2, 1, 9, 11)) < 0.7},
    "mask of heads": {"mask": np.random.default_rng(1).random((1, 4, 1, 11)) < 0.7},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.7},
    "one head": {"of_keys": 1},
    "all heads": {"of_keys": 4},
    "row bias": {"bias": (1, 4, 1, 11)},
    "full bias": {"bias": (2, 4, 9, 11)},
    "shared bias": {"bias": (1, 1, 9, 11)},
    "column bias": {"bias": (2, 1, 9, 1)},
}
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(OPTIONS, 2)
    if pair[0] == pair[1] or not OPTIONS[pair[0]].keys() & OPTIONS[pair[1]].keys()
]


@pytest.mark.thin(7)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " and ".join(dict.fromkeys(pair)))
def test_options_and_pairs_of_them(pair, rng, small_tiles):
    options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
    sizes = {name: options[name] for name in ("of_keys", "bias") if name in options}
    options = {name: value for name, value in options.items() if name not in sizes}
    problem = make_problem(rng, **sizes)
    got = derivatives(ours("tiled"), options)(*as_dtype(problem, jnp.float32))
    assert_close(got, true_derivatives(problem, options), TOLERANCE)


def test_every_option_in_the_reference(rng):
    options = {}
    for name in ("causal", "window", "queries", "keys", "segments", "mask", "softcap", "scale"):
        options |= OPTIONS[name]
    problem = make_problem(rng, bias=(1, 4, 1, 11))
    got = derivatives(ours("reference"), options)(*as_dtype(problem, jnp.float32))
    assert_close(got, true_derivatives(problem, options), TOLERANCE)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(dtype, impl, rng, small_tiles):
    problem = make_problem(rng, bias=(2, 4, 9, 11))
    with jax.enable_x64(dtype == "float64"):
        got = derivatives(ours(impl), {"softcap": 2.0})(*as_dtype(problem, dtype))
        assert {x.dtype.name for x in jax.tree.leaves(got)} == {dtype}
        assert_close(got, true_derivatives(problem, {"softcap": 2.0}), 32 * EPS[dtype])


def test_a_bias_of_another_dtype(rng):
    problem = make_problem(rng, bias=(1, 4, 1, 11))
    slots, tangents, weights = as_dtype(problem, jnp.bfloat16)
    slots, tangents = ((*x[:3], x[3].astype(jnp.float32)) for x in (slots, tangents))
    got = derivatives(ours("tiled"))(slots, tangents, weights)
    assert got[1][3].dtype == got[2][3].dtype == jnp.float32
    assert_close(got, true_derivatives(problem), 32 * EPS["bfloat16"])


def test_as_jax_has_it(rng):
    problem = make_problem(rng, bias=(1, 4, 1, 11))
    slots, _, _ = as_dtype(problem, jnp.float32)
    options = OPTIONS["causal"] | OPTIONS["window"] | OPTIONS["queries"] | OPTIONS["keys"]
    options = {n: jnp.asarray(v, jnp.int32) if "seq" in n else v for n, v in options.items()}
    want = jax.nn.dot_product_attention(*slots, **options, implementation="xla")
    assert_close(ours("auto")(*slots, **options), np.asarray(want), TOLERANCE)
    # Without a batch axis.
    one = [x[0] for x in slots]
    want = jax.nn.dot_product_attention(*one, is_causal=True)
    assert_close(ours("auto")(*one, is_causal=True), np.asarray(want), TOLERANCE)
    ids = jnp.asarray(IDS[0])
    got = ours("auto")(*one, query_segment_ids=ids[:9], key_value_segment_ids=ids)
    want = truth(*slots, query_segment_ids=IDS[:, :9], key_value_segment_ids=IDS)[0]
    assert_close(got, np.asarray(want), TOLERANCE)


class TestRowsThatAttendToNothing:
    def test_they_are_zero_everywhere(self, impl, rng, small_tiles):
        mask = np.ones((2, 4, 9, 11), bool)
        mask[0, :, 3] = mask[1, 2] = mask[:, :, 8] = False
        problem = make_problem(rng, bias=(2, 4, 9, 11))
        got = derivatives(ours(impl), {"mask": mask})(*as_dtype(problem, jnp.float32))
        assert_close(got, true_derivatives(problem, {"mask": mask}), TOLERANCE)
        out, gradient, product = got
        for x in (out, gradient[0], product[0]):
            assert (x[0, 3] == 0).all() and (x[1, :, 2] == 0).all() and (x[:, 8] == 0).all()
        for x in (gradient[3], product[3]):
            assert (np.asarray(x)[~mask] == 0).all()

    def test_so_are_those_of_a_bias_of_minus_infinity(self, impl, rng, small_tiles):
        problem = make_problem(rng, bias=(2, 4, 9, 11))
        problem[0][3][0, :, 3] = problem[0][3][:, :, :, 7:] = -np.inf
        got = derivatives(ours(impl))(*as_dtype(problem, jnp.float32))
        mask = np.isfinite(problem[0][3])
        problem[0][3][~mask] = 0
        assert_close(got, true_derivatives(problem, {"mask": mask}), TOLERANCE)

    @pytest.mark.parametrize(
        "options",
        [{"key_value_seq_lengths": np.zeros(2, int)}, {"query_seq_lengths": np.zeros(2, int)}],
    )
    def test_all_of_them(self, options, impl, rng, small_tiles):
        problem = as_dtype(make_problem(rng, bias=(1, 4, 1, 11)), jnp.float32)
        got = derivatives(ours(impl), options)(*problem)
        assert all((x == 0).all() for x in jax.tree.leaves(got))

    def test_those_beyond_the_window_of_all_keys(self, rng, small_tiles):
        options = {"local_window_size": (1, 0)}
        problem = make_problem(rng, queries=17, keys=5)
        got = derivatives(ours("tiled"), options)(*as_dtype(problem, jnp.float32))
        assert (got[0][:, 6:] == 0).all()
        assert_close(got, true_derivatives(problem, options), TOLERANCE)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_that_are_equal_or_differ_by_little(size, impl, rng, small_tiles):
    """The weights of the keys keep every digit: m + log l, in float32, would lose three of them."""
    problem = make_problem(rng, bias=(1, 4, 1, 11))
    problem[0][3][:] = size + rng.integers(0, 3, problem[0][3].shape)
    problem[0][0][:] = 0
    got = derivatives(ours(impl))(*as_dtype(problem, jnp.float32))
    assert_close(got, true_derivatives(problem), TOLERANCE)


def test_logits_that_leave_one_key(impl, rng, small_tiles):
    problem = make_problem(rng)
    problem[0][0][:] *= 1024
    got = derivatives(ours(impl))(*as_dtype(problem, jnp.float32))
    out = true_derivatives(problem)[0]
    assert_close(got[0], out, TOLERANCE)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_arrays_without_elements(shape, rng):
    problem = as_dtype(make_problem(rng, *shape), jnp.float32)
    out, gradient, product = derivatives(ours("tiled"))(*problem)
    assert out.shape == problem[0][0].shape
    assert all((x == 0).all() for x in (out, *gradient, *product))


@pytest.mark.parametrize("queries,keys", [(13, 13), (5, 29), (29, 5), (1, 1)])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 0), (0, 5), (2, 1), (40, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_only_tiles_that_can_hold_something_are_visited(queries, keys, window, causal, small_tiles):
    options = Options(1.0, is_causal=causal, window=window)
    arrays = (jax.ShapeDtypeStruct((1, n, 1, 1), jnp.float32) for n in (queries, keys))
    grid = tiles.Grid.of(options, *arrays, 1)
    t, s = np.arange(queries)[:, None], np.arange(keys)[None]
    left, right = window or (queries, keys)
    may = (s >= t - left) & (s <= t + right) & (not causal or s <= t)
    for i, (low, high) in enumerate(grid.ranges.T):
        rows = may[i * grid.rows : (i + 1) * grid.rows]
        starts = range(0, keys, grid.columns)
        wanted = [j for j, s in enumerate(starts) if rows[:, s : s + grid.columns].any()]
        assert list(range(low, high)) == wanted


def test_other_tiles_are_not_read(rng, small_tiles):
    """Keys that no query of a tile may attend to may be anything, even what no sum survives."""
    slots, tangents, weights = as_dtype(make_problem(rng, 1, 16, 16), jnp.float32)
    options = {"local_window_size": (3, 2)}
    run = derivatives(ours("tiled"), options)
    want = run(slots, tangents, weights)
    bad = [slots[0], *(x.at[:, 12:].set(jnp.nan) for x in slots[1:])]
    got = run(tuple(bad), tangents, weights)
    for parts in zip(got, want, strict=True):
        # Of the first two tiles of queries, whose last meets the third of keys.
        of_query = [jax.tree.leaves(x)[0][:, :8] for x in parts]
        assert_close(of_query[0], np.asarray(of_query[1]), 1e-6)
