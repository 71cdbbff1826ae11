"""`op.at(params, batches=...)`, and microbatches that a function makes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import losses
from curvax.operators.checked_product import compiled_product
from curvax.operators.conversion import as_operator

RNG = np.random.default_rng(2)
PARAMS = {"w": RNG.standard_normal((3, 2)).astype(np.float32)}
MOVED = {"w": PARAMS["w"] * np.float32(0.7)}
LOSS = losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def batches(seed, sizes=(4, 4)):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((n, 3)).astype(np.float32), rng.integers(0, 2, n)) for n in sizes]


def forward(params, batch):
    return jnp.tanh(batch[0] @ params["w"])


def objective(params, batch):
    return LOSS(forward(params, batch), batch)


KINDS = {
    "recomputed": lambda p, b: cx.hessian(objective, p, b, linearize=False),
    "ggn": lambda p, b: cx.ggn(cx.Model(p, forward, LOSS), b, microbatch_size=4),
    "fisher of samples": lambda p, b: cx.fisher(forward, LOSS, p, b, microbatch_size=1),
    "mc": lambda p, b: cx.fisher(forward, LOSS, p, b, kind="mc", seed=3),
}


def composed(op, again):
    """Of every kind of operator that is made of others."""
    inner = (2 * op - again + cx.identity(op)).congruence(np.arange(1, 7, dtype=np.float32))
    return inner.project_off(np.ones(6, np.float32)).restrict(cx.match_names("w"))


def same_products(op, other, **tolerances):
    v = jnp.asarray(np.random.default_rng(5).standard_normal((2, 6)), jnp.float32)
    np.testing.assert_allclose(compiled_product(op, v), compiled_product(other, v), **tolerances)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_operator_made_of_them(kind):
    op = KINDS[kind](PARAMS, batches(0))
    fresh = KINDS[kind](MOVED, batches(1))
    same_products(op.at(MOVED, batches=batches(1)), fresh, rtol=2e-5, atol=2e-6)
    with pytest.raises(AssertionError):  # as it matters which
        same_products(op.at(MOVED), fresh, rtol=1e-3)


def test_what_is_made_of_operators_goes_along():
    """Also from a generator, which every term of the sum reads."""
    first, second = (
        cx.hessian(objective, *at) for at in ((PARAMS, batches(0)), (MOVED, batches(1)))
    )
    ggn, other = (cx.ggn(forward, LOSS, *at) for at in ((PARAMS, batches(0)), (MOVED, batches(1))))
    moved = composed(first, ggn).at(MOVED, batches=iter(batches(1)))
    same_products(moved, composed(second, other), rtol=2e-5, atol=2e-5)


def test_finite_differences_keep_their_step():
    op = cx.hessian(objective, PARAMS, batches(0), method="finite_difference")
    other = op.at(MOVED, batches=batches(1))
    assert np.isnan(other.relative_error) and other.relative_step == op.relative_step
    v = jnp.ones((1, 6))
    exact = cx.hessian(objective, MOVED, batches(1))
    np.testing.assert_allclose(
        compiled_product(other, v), compiled_product(exact, v), rtol=1e-2, atol=1e-3
    )


def test_nothing_is_compiled_again():
    traces = []

    def loss(params, batch):
        traces.append(0)
        return objective(params, batch)

    sizes = (4, 3)
    op = cx.hessian(loss, PARAMS, batches(0, sizes))
    op @ PARAMS
    before, compiled = len(traces), jax.jit(lambda op, v: op.product(v))
    compiled(op, jnp.ones((1, 6)))
    for seed in (1, 2):
        # In another order too, and from a generator.
        given = batches(seed, sizes) if seed == 1 else iter(batches(seed, sizes)[::-1])
        op = op.at(MOVED, batches=given)
        compiled(op, jnp.ones((1, 6)))
        op @ MOVED
    assert len(traces) == before and compiled._cache_size() == 1


@dataclasses.dataclass(frozen=True, repr=False)
class Converting(cx.Model):
    """Stands in for an adapter, whose batches are of another framework."""

    def prepare(self, batches):
        """A dict becomes a pair."""
        return [(b["x"], b["y"]) for b in batches]


def test_batches_of_another_framework_are_converted_again():
    def foreign(seed):
        return [{"x": x, "y": y} for x, y in batches(seed)]

    model = Converting(PARAMS, forward, LOSS)
    op, fresh = cx.ggn(model, foreign(0)), cx.ggn(model, foreign(1))
    moved = op.at(PARAMS, batches=foreign(1))
    np.testing.assert_array_equal(
        compiled_product(moved, jnp.ones((1, 6))), compiled_product(fresh, jnp.ones((1, 6)))
    )


@pytest.fixture(scope="module")
def op():
    return cx.hessian(objective, PARAMS, batches(0))


@pytest.mark.parametrize(
    "other",
    [
        batches(1)[:1],
        [*batches(1), *batches(2)],
        batches(1, (4, 6)),
        [b[0] for b in batches(1)] + [batches(1)[0][0]],
        [(x, y.astype(np.float32)) for x, y in batches(1)],
    ],
    ids=["fewer", "more", "longer", "arrays", "dtype"],
)
def test_other_shapes_are_refused(other, op):
    with pytest.raises(ValueError, match=r"batches must be as many.*expected .*, got .* anew"):
        op.at(PARAMS, batches=other)


def test_bad_data_are_told_by_their_place(op):
    (x, y), second = batches(1)
    with pytest.raises(ValueError, match="leaf '1' of batch 0 must fit in int32"):
        op.at(PARAMS, batches=[(x, y + 2**32), second])
    with pytest.raises((FloatingPointError, ValueError), match="on batch 1"):
        op.at(PARAMS, batches=[(x, y), (second[0] * np.float32(np.nan), second[1])])


def test_what_was_made_of_no_parameters_cannot_be_moved(op):
    fixed = as_operator(np.eye(6, dtype=np.float32))
    with pytest.raises(TypeError, match="a DenseOperator was not made of parameters and batches"):
        fixed.at(PARAMS)
    function = cx.from_matvec(lambda tree: tree, {"w": PARAMS["w"]})
    with pytest.raises(TypeError, match="a FunctionOperator was not made of parameters"):
        (op + function).at(MOVED)


POINTS = {
    "boundary": RNG.standard_normal((6, 2)).astype(np.float32),
    "interior": RNG.standard_normal((14, 2)).astype(np.float32),
}
NET = {"v": RNG.standard_normal(4).astype(np.float32), "w": RNG.standard_normal((2, 4)).astype("f")}


def squares(params, points):
    return (jnp.tanh(points @ params["w"]) @ params["v"] - jnp.sum(points, axis=1)) ** 2


def physics(params, points):
    """Of a collocation method: a mean over the one array, and one over the other."""
    inner, outer = (squares(params, points[name]) for name in ("interior", "boundary"))
    return jnp.mean(inner) + 10 * jnp.mean(outer)


def weighted(params, points):
    return physics(params, points), 1.0


def parts(count):
    def split(points):
        for i in range(count):
            yield {
                name: x[i * len(x) // count : (i + 1) * len(x) // count]
                for name, x in points.items()
            }

    return split


def test_arrays_of_different_lengths_are_split_by_a_function():
    dense = jax.hessian(lambda flat: physics({"v": flat[:4], "w": flat[4:].reshape(2, 4)}, POINTS))(
        np.concatenate([NET["v"], NET["w"].ravel()])
    )
    op = cx.hessian(weighted, NET, POINTS, microbatch_size=parts(2))
    assert op.num_microbatches == 2 and op.num_batches == 1
    np.testing.assert_allclose(compiled_product(op, jnp.eye(12)), dense, rtol=1e-4, atol=1e-4)
    other = {name: -x for name, x in POINTS.items()}
    moved = op.at(NET, batches=other)
    whole = cx.hessian(physics, NET, other)
    np.testing.assert_allclose(
        compiled_product(moved, jnp.eye(12)),
        compiled_product(whole, jnp.eye(12)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_parts_of_any_length_carry_their_shares():
    """The sum over a microbatch is its mean times its weight, and the weights add up to one."""
    shares = {"boundary": np.full(6, 10 / 6 / 11, "f"), "interior": np.full(14, 1 / 14 / 11, "f")}
    batch = {name: (x, shares[name]) for name, x in POINTS.items()}

    def loss(params, batch):
        total = sum(jnp.sum(share * squares(params, x)) for x, share in batch.values())
        weight = sum(jnp.sum(share) for _, share in batch.values())
        return total / weight, weight

    def split(batch):
        return [
            jax.tree.map(
                lambda leaf, a=a, b=b: leaf[a * len(leaf) // 14 : b * len(leaf) // 14], batch
            )
            for a, b in ((0, 3), (3, 10), (10, 14))
        ]

    op = cx.hessian(loss, NET, batch, microbatch_size=split)
    whole = cx.hessian(physics, NET, POINTS)
    assert op.num_microbatches == 3
    np.testing.assert_allclose(
        11 * compiled_product(op, jnp.eye(12)),
        compiled_product(whole, jnp.eye(12)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_microbatches_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"no weight of its own.*\(mean, weight\)"):
        cx.hessian(physics, NET, POINTS, microbatch_size=parts(2))
    with pytest.raises(ValueError, match=r"splits batches of loss .* must be the same.*weight"):
        cx.hessian(weighted, NET, POINTS, microbatch_size=parts(4))  # of 3 or 4, and of 1 or 2
    with pytest.raises(ValueError, match="must be the same"):
        cx.hessian(weighted, NET, POINTS, microbatch_size=lambda b: list(parts(2)(b))[:1])


def test_a_function_may_split_what_a_size_splits():
    def by(size):
        def split(batch):
            x, y = batch
            return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]

        return split

    for make in (
        lambda how: cx.ggn(forward, LOSS, PARAMS, batches(0), microbatch_size=how),
        lambda how: cx.fisher(
            forward, LOSS, PARAMS, batches(0), kind="mc", seed=1, microbatch_size=how
        ),
    ):
        np.testing.assert_array_equal(
            compiled_product(make(by(3)), jnp.eye(6)), compiled_product(make(3), jnp.eye(6))
        )


@pytest.mark.parametrize(
    "split, error, message",
    [
        (lambda b: b["interior"], TypeError, "must return a list of microbatches or yield them"),
        (
            lambda b: b,
            TypeError,
            "must return a list of microbatches or yield them, got {'boundary",
        ),
        (lambda b: None, TypeError, "got None for batch 0"),
        (lambda b: [], ValueError, "returned none for batch 0"),
        (lambda b: [{"interior": "x"}], TypeError, "leaf 'interior' of microbatch 0 of batch 0"),
        (lambda b: [jax.tree.map(lambda x: x[:0], b)], ValueError, "microbatch 0 of batch 0 is em"),
        (2.0, TypeError, "microbatch_size must be an integer, got 2.0"),
    ],
)
def test_bad_functions(split, error, message):
    with pytest.raises(error, match=message):
        cx.hessian(weighted, NET, POINTS, microbatch_size=split)
