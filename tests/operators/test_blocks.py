"""Diagonal blocks and restrictions against slices of dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax.operators import base
from curvax.operators.checked_product import compiled_product


def _noise(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


LISTED = {
    "blocks": [
        {"attn": {"out": _noise(i, 3, 2), "qkv": _noise(i + 9, 2, 3)}, "mlp": _noise(i + 5, 4)}
        for i in range(3)
    ],
    "embed": _noise(20, 5),
    "temperature": _noise(21),
}
# The same numbers with the layers on the leading axis.
STACKED = {
    "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *LISTED["blocks"]),
    "embed": LISTED["embed"],
    "temperature": LISTED["temperature"],
}
N = 3 * 16 + 5 + 1


def _matrix(size=N, seed=3):
    a = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)
    return a + a.T


def _operator(like, matrix):
    _, unravel = ravel_pytree(like)
    a = jnp.asarray(matrix)
    return cx.from_matvec(
        lambda v: unravel(jnp.dot(a, ravel_pytree(v)[0], precision="highest")), like
    )


def _dense(op):
    return np.asarray(op.product(jnp.eye(op.shape[0], dtype=op.dtype)))


def _places(like, matches):
    """Indices into the flat vector of the leaves whose names match."""
    names = cx.identity(like).space.names
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    starts = np.cumsum([0, *sizes])
    chosen = [
        np.arange(s, s + z) for n, s, z in zip(names, starts, sizes, strict=False) if matches(n)
    ]
    return np.concatenate(chosen)


class TestRestriction:
    def test_is_a_slice_of_the_matrix(self):
        matrix = _matrix()
        op = _operator(LISTED, matrix).restrict(cx.match_names("*.attn.*", "embed"))
        at = _places(LISTED, lambda name: ".attn." in name or name == "embed")
        np.testing.assert_allclose(_dense(op), matrix[np.ix_(at, at)], rtol=1e-5, atol=1e-5)

    def test_vectors_have_none_for_the_others(self):
        op = _operator(LISTED, _matrix()).restrict(cx.match_names("embed"))
        v = {"blocks": jax.tree.map(lambda _: None, LISTED["blocks"]), "temperature": None}
        out = op @ {**v, "embed": jnp.ones(5)}
        assert out["temperature"] is None and out["embed"].shape == (5,)

    def test_equals_the_filter_of_the_operator_itself(self):
        def loss(p, batch):
            return jnp.mean(jnp.tanh(batch @ p["w"]) @ p["v"]) ** 2 + jnp.sum(p["v"] ** 4)

        params, batch = {"v": _noise(1, 4), "w": _noise(2, 6, 4)}, _noise(3, 20, 6)
        where = cx.match_names("w")
        own = cx.hessian(loss, params, batch, where=where)
        cut = cx.hessian(loss, params, batch).restrict(where)
        assert cut.space == own.space
        np.testing.assert_allclose(_dense(cut), _dense(own), rtol=1e-4, atol=1e-6)

    def test_nothing_selected(self):
        with pytest.raises(ValueError, match=r"where selects no parameter.*'embed'"):
            _operator(LISTED, _matrix()).restrict(cx.match_names("embedding"))


class TestBlocks:
    @pytest.mark.thin(3)
    @pytest.mark.parametrize("like", [LISTED, STACKED], ids=["listed", "stacked"])
    @pytest.mark.parametrize("by", [3, 2, "kind", "filters"])
    def test_are_slices_of_the_matrix(self, like, by):
        # The matrix of the listed form, in the order of the form at hand.
        listed = jax.tree.map(lambda x: x, LISTED)
        _, unravel = ravel_pytree(listed)
        index = unravel(jnp.arange(N, dtype=jnp.float32))
        if like is STACKED:
            index["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *index["blocks"])
        order = np.asarray(ravel_pytree(index)[0]).astype(int)
        matrix = _matrix()
        op = _operator(like, matrix[np.ix_(order, order)])
        given = {
            "kind": lambda name: next((k for k in ("attn", "mlp") if k in name), None),
            "filters": {
                "first": cx.match_names("blocks.0.*"),
                "all attention": cx.match_regex(r"\.attn\."),
            },
        }.get(by, by)
        found = op.blocks(given, stacked="blocks" if like is STACKED else ())
        expected = {
            3: ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "blocks.2.attn",
                "blocks.2.mlp", "embed", "temperature"],
            2: ["blocks.0", "blocks.1", "blocks.2", "embed", "temperature"],
            "kind": ["attn", "mlp"],
            "filters": ["first", "all attention"],
        }[by]  # fmt: skip
        assert sorted(found) == sorted(expected) and len(found) == len(expected)
        for name, block in found.items():
            test = {
                "kind": lambda leaf, name=name: name in leaf,
                "filters": lambda leaf, name=name: (
                    ".attn." in leaf if name == "all attention" else leaf.startswith("blocks.0.")
                ),
            }.get(by, lambda leaf, name=name: leaf == name or leaf.startswith(f"{name}."))
            at = _places(listed, test)
            # The leaves of a block may come in another order.
            np.testing.assert_allclose(
                np.sort(np.linalg.eigvalsh(_dense(block))),
                np.sort(np.linalg.eigvalsh(matrix[np.ix_(at, at)])),
                rtol=1e-4,
                atol=1e-4,
            )

    def test_equal_layers_share_one_compiled_product(self, monkeypatch):
        found = _operator(LISTED, _matrix()).blocks(2)
        jax.clear_caches()
        traced = []

        def product(op, block):
            traced.append(op)
            return op.product(block)

        monkeypatch.setattr(base, "checked_product", product)
        for name in ("blocks.0", "blocks.1", "blocks.2"):
            compiled_product(found[name], jnp.ones((1, 16)))
        assert len(traced) == 1

    def test_vectors_are_named_by_what_differs(self):
        found = _operator(STACKED, _matrix()).blocks(3, stacked="blocks")
        out = found["blocks.1.attn"] @ {"out": jnp.ones((3, 2)), "qkv": jnp.ones((2, 3))}
        assert {k: v.shape for k, v in out.items()} == {"out": (3, 2), "qkv": (2, 3)}
        assert (found["embed"] @ {"embed": jnp.ones(5)})["embed"].shape == (5,)

    def test_of_algebra_and_of_blocks(self):
        matrix = _matrix()
        op = _operator(LISTED, matrix)
        damped = (2 * op + cx.identity(op)).blocks(2)["blocks.1"]
        plain = _dense(op.blocks(2)["blocks.1"])
        np.testing.assert_allclose(_dense(damped), 2 * plain + np.eye(16), rtol=1e-4, atol=1e-4)
        inner = op.blocks(2)["blocks.1"].blocks(1)["attn"]
        np.testing.assert_allclose(_dense(inner), plain[:12, :12], rtol=1e-5)

    @pytest.mark.parametrize(
        "by,stacked,error,message",
        [
            (0, (), ValueError, "by, a depth, must be at least 1, got 0"),
            (True, (), TypeError, "by must be a depth"),
            ("blocks", (), TypeError, "by must be a depth"),
            (lambda name: None, (), ValueError, "by returns None for every leaf: .*embed"),
            (lambda name: 3, (), TypeError, "by must return a string or None, got 3"),
            ({"a": cx.match_names("atn")}, (), ValueError, r"by\['a'\] selects no parameter"),
            ({}, (), ValueError, "by, a dict of filters, must have at least one"),
            ({"a": "attn"}, (), TypeError, r"by\['a'\] must be a predicate"),
            (1, "layers", ValueError, "stacked names 'layers', but no leaf is in it"),
        ],
    )
    def test_bad_input(self, by, stacked, error, message):
        with pytest.raises(error, match=message):
            _operator(LISTED, _matrix()).blocks(by, stacked=stacked)

    def test_a_block_without_a_parameter(self):
        op = cx.identity({"empty": jnp.ones((0, 3)), "w": jnp.ones(2)})
        with pytest.raises(ValueError, match="by makes a block 'empty' without a parameter"):
            op.blocks(lambda name: name)
        assert list(op.blocks(1)) == ["w"]
        assert list(op.blocks(lambda name: name if name == "w" else None)) == ["w"]

    def test_a_stacked_scalar(self):
        op = cx.identity({"layers": {"scale": jnp.ones(()), "w": jnp.ones((2, 3))}})
        with pytest.raises(ValueError, match="'layers.scale' is a scalar"):
            op.blocks(2, stacked="layers")
