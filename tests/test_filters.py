"""Parameter filters and names."""

import numpy as np
import pytest

from curvax.filters import leaf_names, match_names, match_regex, select

PARAMS = {"blocks": [{"attn": {"qkv": 0.0}, "mlp": {"up": 0.0}}] * 2, "head": np.zeros(2)}
NAMES = ["blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.1.attn.qkv", "blocks.1.mlp.up", "head"]


def test_names_are_paths_joined_by_dots():
    assert leaf_names(PARAMS) == NAMES
    assert leaf_names(np.zeros(2)) == [""]


@pytest.mark.parametrize(
    "where, chosen",
    [
        (None, {0, 1, 2, 3, 4}),
        (match_names("*.attn.*"), {0, 2}),
        (match_names("head", "blocks.1.*"), {2, 3, 4}),
        (match_names("attn"), set()),
        (match_regex("attn"), {0, 2}),
        (match_regex(r"^blocks\.0", "head$"), {0, 1, 4}),
        (lambda name, leaf: np.ndim(leaf) == 1, {4}),
    ],
)
def test_selection(where, chosen):
    if chosen:
        assert select(PARAMS, where) == tuple(i in chosen for i in range(5))
    else:
        with pytest.raises(ValueError, match="'attn' matches no name; the nearest are .*'head'"):
            select(PARAMS, where)


def test_not_a_regular_expression():
    with pytest.raises(ValueError, match=r"match_regex .* got 'a\('.*unterminated"):
        match_regex("head", "a(")


def test_a_bare_string_suggests_match_names():
    with pytest.raises(TypeError, match=r"got 'head': did you mean match_names\('head'\)\?"):
        select(PARAMS, "head")


@pytest.mark.parametrize("function", [match_names, match_regex])
def test_patterns_must_be_strings(function):
    for patterns in ((), (3,), (None,)):
        with pytest.raises(TypeError, match=function.__name__):
            function(*patterns)
