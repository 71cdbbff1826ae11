"""What a loss returns beside the mean, and lists in place of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import losses
from curvax.jaxprs import reads
from curvax.operators.batches import warn_of_pair

RNG = np.random.default_rng(1)
X = RNG.standard_normal((20, 2)).astype(np.float32)
Y = RNG.integers(0, 3, 20).astype(np.int32)
PARAMS = {"w": RNG.standard_normal((2, 3)).astype(np.float32)}
BATCHES = [(X[:12], Y[:12]), (X[12:], Y[12:])]


def forward(params, batch):
    return batch[0] @ params["w"]


def mean(outputs, batch):
    return losses.softmax_cross_entropy(outputs, batch[1])


def accuracy(outputs, batch):
    return jnp.mean((jnp.argmax(outputs, axis=1) == batch[1]).astype(jnp.float32))


def jitted(outputs, batch):
    return jax.jit(accuracy)(outputs, batch)


def scanned(outputs, batch):
    """As the count in a loop over the samples, in which the mean is computed too."""

    def step(carry, entry):
        total, hits = carry
        right = (jnp.argmax(entry[0]) == entry[1]).astype(jnp.float32)
        return (total + entry[0][0], hits + right), None

    start = (jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(step, start, (outputs, batch[1]))[0][1]


def branched(outputs, batch):
    return jax.lax.cond(outputs[0, 0] > 0, lambda: jnp.float32(1), lambda: jnp.float32(2))


def looped(outputs, batch):
    """As often as the outputs say."""
    state = (jnp.float32(0), jnp.max(jnp.abs(outputs)))
    step = lambda s: (s[0] + 1, s[1] / 2)  # noqa: E731
    return jax.lax.while_loop(lambda s: s[1] > 1e-3, step, state)[0]


def custom(outputs, batch):
    return jax.nn.relu(jnp.max(outputs)) + 1  # a custom_jvp function


METRICS = [accuracy, jitted, scanned, branched, looped, custom]


def number(outputs, batch):
    return jnp.sum((batch[1] != 1).astype(jnp.float32))


def number_in_a_loop(outputs, batch):
    """The number of labels, in the loop that sums the loss up too."""

    def step(carry, entry):
        total, count, i = carry
        return (total + entry[0][0], count + (entry[1] != 1).astype(jnp.int32), i + 1), None

    start = (jnp.float32(0), jnp.int32(0), jnp.int32(0))
    return jax.lax.scan(step, start, (outputs, batch[1]))[0][1]


def number_of_steps(outputs, batch):
    return jax.lax.while_loop(
        lambda s: s[0] < batch[1].shape[0], lambda s: (s[0] + 1, s[1] * 2), (0, outputs)
    )[0]


def number_of_a_branch(outputs, batch):
    return jax.checkpoint(
        lambda z: jax.lax.cond(batch[1][0] > 0, lambda z: (z[0, 0], 7), lambda z: (z[0, 1], 8), z)
    )(outputs)[1]


NUMBERS = [number, number_in_a_loop, number_of_steps, number_of_a_branch]


def operators(second):
    def loss(outputs, batch):
        return mean(outputs, batch), second(outputs, batch)

    def objective(params, batch):
        return loss(forward(params, batch), batch)

    yield lambda: cx.hessian(objective, PARAMS, BATCHES)
    yield lambda: cx.hessian(objective, PARAMS, BATCHES, linearize=False)
    yield lambda: cx.ggn(cx.Model(PARAMS, forward, loss), BATCHES)
    yield lambda: cx.fisher(forward, loss, PARAMS, BATCHES, microbatch_size=1)


@pytest.mark.parametrize("place", range(4))
def test_an_accuracy_is_no_weight(place):
    with pytest.warns(UserWarning, match=r"computed from the parameters.*\(mean, weight\)") as seen:
        op = list(operators(accuracy))[place]()
    assert seen[0].filename == __file__
    assert op.num_batches == 2


def moves(second):
    """Whether the program that the loss is traced to computes its second part from the params."""
    traced = jax.make_jaxpr(lambda p, b: (0.0, second(forward(p, b), b)))(PARAMS, BATCHES[0])
    return reads(traced.jaxpr, [1])[len(traced.jaxpr.constvars)]


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_by_any_flow_of_data_is_no_weight(metric):
    assert moves(metric)


@pytest.mark.parametrize("count", NUMBERS)
def test_a_number_of_labels_is_a_weight(count):
    assert not moves(count)


def test_a_number_in_the_loop_of_the_loss_is_a_weight_of_its_operator():
    op = next(operators(number_in_a_loop))()
    assert float(op.weight) == np.sum(Y != 1)


def test_a_parameter_that_is_left_out_may_weigh():
    def loss(params, batch):
        return mean(forward(params, batch), batch), params["classes"][batch[1]].sum()

    params = PARAMS | {"classes": np.asarray([1, 2, 3], np.float32)}
    op = cx.hessian(loss, params, BATCHES, where=cx.match_names("w"))
    assert float(op.weight) == params["classes"][Y].sum()


def test_the_flow_through_every_kind_of_loop_and_call():
    """Against derivatives, where these see it: each input alone moves what the walk says."""

    def fun(a, b, c, d):
        def step(carry, x):
            first, second = carry
            return (second + x, second * a), first

        (first, _), seen = jax.lax.scan(step, (b, b), jnp.arange(3.0))
        value = jax.jit(lambda x, y: (x, jax.checkpoint(jnp.sin)(y)))(c, d)
        return first, seen[-1], value[0], value[1], jax.nn.relu(c * 2)

    args = [jnp.float32(x) for x in (1.5, 2.5, 3.5, 4.5)]
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    jacobian = jax.jacobian(fun, argnums=(0, 1, 2, 3))(*args)
    for i, row in enumerate(jacobian):
        assert reads(jaxpr, [i])[len(jaxpr.constvars) :] == [bool(d != 0) for d in row]


def weighed(params, batch):
    return mean(forward(params, batch), batch), batch[2]


def test_a_batch_without_weight_is_told():
    batches = [(*BATCHES[0], np.float32(3)), (*BATCHES[1], np.float32(0))]
    with pytest.warns(UserWarning, match=r"0 on 1 of 2 batches \(batch 1\).*\(mean, weight\)"):
        op = cx.hessian(weighed, PARAMS, batches)
    np.testing.assert_allclose(op.loss, mean(forward(PARAMS, BATCHES[0]), BATCHES[0]), rtol=1e-6)
    op = cx.hessian(weighed, PARAMS, [(*b, np.float32(3)) for b in BATCHES])
    with pytest.warns(UserWarning, match=r"0 on 1 of 2 batches \(batch 0\)"):
        op.at(PARAMS, batches=batches[::-1])


def test_a_microbatch_without_weight_is_not():
    """All labels of some sequences are masked, but not all of a batch."""
    labels = np.where(np.arange(20) % 3 == 0, Y, -100)
    loss = losses.SoftmaxCrossEntropy(lambda batch: batch[1])
    op = cx.ggn(forward, loss, PARAMS, (X, labels), microbatch_size=1)
    whole = cx.ggn(forward, loss, PARAMS, (X, labels))
    np.testing.assert_allclose(op.loss, whole.loss, rtol=1e-6)
    assert float(op.weight) == 7


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_a_metric_that_is_no_weight_at_all_is_refused_by_the_convention(weight):
    batches = [(*b, np.float32(weight)) for b in BATCHES]
    with pytest.raises(ValueError, match=r"on batch 0.*\(mean, weight\)"):
        cx.hessian(weighed, PARAMS, batches)
    with pytest.raises(ValueError, match=r"positive sum.*\(mean, weight\)"):
        cx.hessian(weighed, PARAMS, [(*b, np.float32(0)) for b in BATCHES])


def slope(params, batch):
    return jnp.mean((batch[0] * params - batch[1]) ** 2)


A, B = X[:, :1], X[:, 1:]


@pytest.mark.parametrize("pair", [[A, B], [X, X[:, 0]]])
def test_a_list_of_two_arrays_is_two_batches(pair):
    def loss(p, b):
        return jnp.mean((b[0].sum() * p - b[1].sum()) ** 2)

    with pytest.warns(UserWarning, match=r"a list, which means several batches.*tuple, \(x, y\)"):
        op = cx.hessian(loss, jnp.float32(1), pair)
    assert op.num_batches == 2
    silent = cx.hessian(loss, jnp.float32(1), iter(pair))
    assert float(silent.loss) == float(op.loss)


def test_other_lists_are_silent():
    silent = ([(A, B)], [(A, B), (A, B)], [A], [X, X[:7]], [X, X, X], (A, B), A, iter([A, B]))
    for batches in silent:
        warn_of_pair(batches)
    for batches in ([A[:, 0], B[:, 0]], [X[:, 0], Y], [X, Y, X[:, 0]]):
        with pytest.warns(UserWarning, match="which means several batches"):
            warn_of_pair(batches)


def test_printed_operators_say_what_they_are_the_mean_of():
    one = repr(cx.hessian(slope, jnp.float32(1), (A, B)))
    assert "batches=1, samples=20, weight=20, loss=" in one
    several = cx.ggn(forward, mean, PARAMS, [*BATCHES, (X[:3], Y[:3])], microbatch_size=4)
    assert "batches=3, samples=23, weight=23, loss=" in str(several)
    assert "batches=1, samples=4, weight=4" in str(several.microbatch(1))
    pieces = {"boundary": X[:5], "interior": X}
    ragged = cx.hessian(lambda p, b: p**2 * jnp.mean(b["interior"]), jnp.float32(1), pieces)
    assert "samples=5 and 20" in repr(ragged)
    assert repr(jax.jit(lambda op: jnp.float32(len(repr(op))))(ragged))  # under a trace too
