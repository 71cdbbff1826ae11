"""Data that JAX would change on the way in: wide numbers, masks, tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import losses
from curvax.arrays import to_array
from curvax.operators.conversion import as_operator

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 2)).astype(np.float32)
Y = RNG.integers(0, 3, 6)
PARAMS = {"w": RNG.standard_normal((2, 3)).astype(np.float32)}
LOSS = losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def forward(params, batch):
    return batch[0] @ params["w"]


def objective(params, batch):
    return LOSS(forward(params, batch), batch)


OPERATORS = {
    "hessian": lambda params, batches: cx.hessian(objective, params, batches),
    "ggn": lambda params, batches: cx.ggn(forward, LOSS, params, batches),
    "fisher": lambda params, batches: cx.fisher(forward, LOSS, params, batches),
    "mc": lambda params, batches: cx.fisher(forward, LOSS, params, batches, kind="mc", seed=0),
    "model": lambda params, batches: cx.ggn(cx.Model(params, forward, LOSS), batches),
    "differences": lambda params, batches: cx.hessian(
        objective, params, batches, method="finite_difference"
    ),
}
kinds = pytest.mark.parametrize("kind", OPERATORS)


class Tensor:
    """Stands in for a tensor of torch, of which NumPy would drop nothing but the gradient."""

    def __init__(self, values, requires_grad=True):
        self.values, self.requires_grad = np.asarray(values), requires_grad
        self.shape, self.dtype = self.values.shape, f"torch.{self.values.dtype}"

    def detach(self):
        return Tensor(self.values, requires_grad=False)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        assert not self.requires_grad, "Can't call numpy() on Tensor that requires grad"
        return np.asarray(self.values, dtype)


@kinds
@pytest.mark.parametrize(
    "labels",
    [Y + 2**32, Y - 2**31 - 5, Y.astype(np.uint64) + np.uint64(2**32), Tensor(Y + 2**40)],
    ids=["int64", "negative", "uint64", "torch"],
)
def test_labels_beyond_32_bits_are_refused(kind, labels):
    with pytest.raises(
        ValueError, match=r"leaf '1' of batch 0 must fit in u?int32.*jax_enable_x64"
    ):
        OPERATORS[kind](PARAMS, (X, labels))


def test_labels_that_fit_are_taken_whatever_their_dtype():
    expected = float(cx.ggn(forward, LOSS, PARAMS, (X, Y.astype(np.int32))).loss)
    for labels in (Y, Y.astype(np.uint32), Y.astype(np.uint64), Y.astype(np.uint8), Tensor(Y)):
        assert float(cx.ggn(forward, LOSS, PARAMS, (X, labels)).loss) == expected


def test_labels_of_64_bits_stay_so_in_the_64_bit_mode():
    with jax.enable_x64(True), pytest.raises(FloatingPointError, match="label out of range"):
        cx.hessian(lambda p, b: objective(p, b)[0], PARAMS, (X, Y + 2**32))


def test_the_second_batch_of_a_generator_is_checked_too():
    with pytest.raises(ValueError, match="leaf '1' of batch 1 must fit in int32"):
        cx.ggn(forward, LOSS, PARAMS, (batch for batch in [(X, Y), (X, Y + 2**33)]))


def test_integers_among_the_parameters_are_checked():
    def shifted(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2) * params["shift"].astype(jnp.float32)

    where = cx.match_names("w")
    op = cx.hessian(shifted, PARAMS | {"shift": np.int64(3)}, X, where=where)
    for value, kind in ((np.int64(2**32 + 3), ValueError), (np.float32(1.5), TypeError)):
        with pytest.raises(kind, match="parameter 'shift' must"):
            op.at(PARAMS | {"shift": value})
    with pytest.raises(ValueError, match="parameter 'shift' must fit in int32.* got 4294967299"):
        cx.hessian(shifted, PARAMS | {"shift": np.int64(2**32 + 3)}, X, where=where)


@kinds
def test_float64_data_are_rounded_but_not_made_infinite(kind):
    wide = X.astype(np.float64) * (1 + 1e-9)
    assert float(OPERATORS[kind](PARAMS, (wide, Y)).loss) == pytest.approx(
        float(OPERATORS[kind](PARAMS, (X, Y)).loss), rel=1e-6
    )
    wide[3, 1] = 1e39
    with pytest.raises(ValueError, match=r"leaf '0' of batch 0 must fit in float32.* got 1e\+39"):
        OPERATORS[kind](PARAMS, (wide, Y))
    wide[3, 1] = np.inf  # no wonder then: the loss says what it makes of it
    with pytest.raises((FloatingPointError, ValueError), match="the loss is nan|the weight"):
        OPERATORS[kind](PARAMS, (wide, Y))


def test_parameters_and_vectors_in_float64():
    op = cx.hessian(objective, PARAMS, (X, Y))
    with pytest.raises(ValueError, match=r"parameter 'w' must fit in float32.* got 1e\+300"):
        op.at({"w": np.full((2, 3), 1e300)})
    with pytest.raises(ValueError, match="leaf 'w' of vector must fit in float32"):
        op @ {"w": np.full((2, 3), -1e40)}
    with pytest.raises(ValueError, match="parameter 'c' must fit in float32"):
        cx.hessian(lambda p, b: p["c"] ** 2 * jnp.mean(b), {"c": 1e300}, X)
    with pytest.raises(TypeError, match="parameter 'w' must be real"):
        op.at({"w": np.full((2, 3), 1j, np.complex64)})


MASKED = np.ma.masked_array(X, mask=X > 0)


@kinds
def test_masked_arrays_are_refused_with_the_remedy(kind):
    message = r"is a NumPy masked array, whose mask would be ignored.*array\.filled.*as weights"
    with pytest.raises(TypeError, match=f"leaf '0' of batch 0 {message}"):
        OPERATORS[kind](PARAMS, (MASKED, Y))
    with pytest.raises(TypeError, match=f"parameter 'w' {message}"):
        OPERATORS[kind]({"w": MASKED[:2]}, (X[:, :2], Y))


def test_masked_arrays_elsewhere():
    op = cx.hessian(objective, PARAMS, (X, Y))
    square = np.ma.masked_array(np.eye(3, dtype=np.float32), mask=np.eye(3))
    for use in (
        lambda: op.at({"w": np.ma.masked_array(PARAMS["w"], mask=True)}),
        lambda: op @ {"w": np.ma.masked_array(PARAMS["w"], mask=True)},
        lambda: op.congruence({"w": np.ma.masked_array(PARAMS["w"], mask=True)}),
        lambda: as_operator(square),
        lambda: losses.softmax_cross_entropy(np.ma.masked_array(X, mask=True), Y % 2),
        lambda: losses.softmax_cross_entropy(X, np.ma.masked_array(Y % 2, mask=True)),
        lambda: losses.softmax_cross_entropy(X, Y % 2, weights=np.ma.masked_array(X[:, 0])),
        lambda: losses.mse(X, MASKED),
    ):
        with pytest.raises(TypeError, match="masked array"):
            use()


def test_parameters_of_torch_are_taken():
    """As of `dict(module.named_parameters())`, which require gradients; and a frozen one."""
    op = cx.hessian(objective, PARAMS, (X, Y))
    moved = op.at({"w": Tensor(2 * PARAMS["w"])})
    fresh = cx.hessian(objective, {"w": 2 * PARAMS["w"]}, (X, Y))
    v = {"w": jnp.ones((2, 3))}
    np.testing.assert_allclose((moved @ v)["w"], (fresh @ v)["w"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"params must have the structure .*, with 'frozen'"):
        op.at({"w": Tensor(PARAMS["w"]), "frozen": Tensor(PARAMS["w"])})


@pytest.mark.parametrize("value", ["text", np.array(["a"]), object(), [[1.0], [1.0, 2.0]]])
def test_what_is_no_array_of_numbers(value):
    with pytest.raises(TypeError, match="x must be an array of numbers, got"):
        to_array(value, "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool", "float8_e4m3fn"])
def test_narrow_arrays_are_taken_as_they_are(dtype):
    array = np.ones((2, 3), jnp.dtype(dtype))
    assert to_array(array, "x").dtype == jnp.dtype(dtype)
    assert to_array(jnp.asarray(array), "x").dtype == jnp.dtype(dtype)


def test_numbers_keep_their_weak_type():
    for value in (True, 3, 1.5):
        assert to_array(value, "x").weak_type == jnp.asarray(value).weak_type
    with pytest.raises(ValueError, match="x must fit in int32"):
        to_array(2**31, "x")
