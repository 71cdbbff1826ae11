"""What a new user gets wrong in the arguments of `hessian`, and what the error says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

X, Y = np.ones((4, 3), np.float32), np.ones(4, np.float32)
PARAMS = {"w": np.asarray([1, 2, 3], np.float32)}


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


@dataclasses.dataclass
class NotAPytree:
    w: int = 1


class TestLoss:
    @pytest.mark.parametrize("linearize", [True, False])
    @pytest.mark.parametrize("value", [3.0, 3, None, "text", {"loss": 1.0}])
    def test_not_an_array(self, value, linearize):
        kind = type(value).__name__
        with pytest.raises(TypeError, match=f"loss must return a scalar array.* got {kind}"):
            cx.hessian(lambda p, b: value, PARAMS, X, linearize=linearize)

    def test_mean_of_a_pair_that_is_not_an_array(self):
        with pytest.raises(TypeError, match="scalar array that depends on .* got float"):
            cx.hessian(lambda p, b: (3.0, 4), PARAMS, X)

    def test_bad_weights(self):
        with pytest.raises(TypeError, match="scalar weight, got str"):
            cx.hessian(lambda p, b: (jnp.sum(p["w"]), "heavy"), PARAMS, X)
        with pytest.raises(ValueError, match=r"scalar weight, got shape \(4, 3\)"):
            cx.hessian(lambda p, b: (jnp.sum(p["w"]), b), PARAMS, X)


class TestLeavesThatAreNotArrays:
    @pytest.mark.parametrize("linearize", [True, False])
    def test_left_out_they_reach_the_loss_as_they_are(self, linearize):
        def with_constants(params, batch):
            assert params["kind"] == "mean" and params["power"] == 2
            assert isinstance(params["more"][0], NotAPytree)
            return params["act"](jnp.sum(params["scale"] * params["w"] ** params["power"]))

        params = {
            "act": jax.nn.softplus,
            "kind": "mean",
            "more": [NotAPytree(), np.asarray(["a"])],
            "power": 2,
            "scale": np.float32(0.5),
            "w": PARAMS["w"],
        }
        where = cx.match_names("w")
        op = cx.hessian(with_constants, params, X, where=where, linearize=linearize)
        dense = jax.hessian(lambda w: jax.nn.softplus(jnp.sum(0.5 * w**2)))(params["w"])
        product = op @ op.unravel(jnp.ones(3))
        assert product["act"] is None and product["more"] == [None, None]
        np.testing.assert_allclose(product["w"], dense.sum(axis=1), rtol=1e-5)

    @pytest.mark.parametrize("leaf", ["relu", jax.nn.relu, NotAPytree(), True, np.asarray(["a"])])
    def test_selected_they_are_named(self, leaf):
        message = f"parameter 'm.0' must be an array, got {type(leaf).__name__}: leave it out by"
        with pytest.raises(TypeError, match=message):
            cx.hessian(loss, PARAMS | {"m": [leaf]}, (X, Y))

    def test_python_floats_are_parameters(self):
        op = cx.hessian(lambda p, b: p["w"] ** 2 * jnp.mean(b), {"w": 1.5}, X)
        np.testing.assert_allclose((op @ {"w": jnp.float32(1)})["w"], 2)


def test_parameters_without_an_element():
    with pytest.raises(ValueError, match=r"params .* at least one element.*'w': \(0,\)"):
        cx.hessian(lambda p, b: jnp.mean(b), {"w": np.ones(0, np.float32)}, X)


def test_a_list_in_place_of_a_tuple():
    with pytest.raises(ValueError, match=r"shapes \(4, 3\), \(4,\)\) by itself.* as a tuple"):
        cx.hessian(loss, PARAMS, [X, Y])


def test_a_tuple_in_place_of_a_list():
    with pytest.raises(TypeError, match=r"2 tuples are batches, pass them as a list"):
        cx.hessian(loss, PARAMS, ((X, Y), (X, Y)))


def test_no_hint_where_batches_are_as_they_should_be():
    for batches in ([(X, Y)], (X, Y), X):
        with pytest.raises(KeyError) as caught:
            cx.hessian(lambda p, b: jnp.sum(p["v"]), PARAMS, batches)
        assert not any("batches" in note for note in getattr(caught.value, "__notes__", ()))


@pytest.mark.parametrize(
    "linearize, error", [(1, TypeError), (0, TypeError), (None, TypeError), ("never", ValueError)]
)
def test_linearize(linearize, error):
    with pytest.raises(error, match=f"linearize must be True, False or 'auto', got {linearize!r}"):
        cx.hessian(loss, PARAMS, (X, Y), linearize=linearize)
