"""`precision=` of an operator: the products in the program lowered for CUDA, and their noise."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.jaxprs import Rewriter, rewritten
from curvax.models import gpt
from curvax.operators.ggn import GaussNewtonMap
from curvax.operators.hessian import HessianMap

BATCH = np.arange(2 * 17, dtype=np.uint8).reshape(2, 17)
SPLIT, HIGHEST, DEFAULT = "bf16x3", "HIGHEST", "DEFAULT"


@pytest.fixture
def on_device(monkeypatch):
    """As where JAX's default device is a CUDA device without curvax's kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("CURVAX_IMPL", "reference")


def products(text):
    """The precisions of the products in a program: counts by name and having batch axes or not."""
    found = collections.Counter()
    for line in text.splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            split = "num_primitive_operations = 3" in line
            name = re.search(r"precision(?:_config)? = \[[^\]]*?(DEFAULT|HIGHEST|HIGH)", line)[1]
            found[SPLIT if split else name, "batching_dims" in line] += 1
    return found


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def product_of(model, half_of, leaves, batch):
    """The product of a map's microbatches, without residuals, and the types of these."""
    if half_of == "linearized":
        product = model.keeping(leaves, batch, np.inf)
    else:
        product = model.recomputing(leaves, batch)
    return product, jax.eval_shape(product.evaluate, leaves, batch)[2]


def one_product(product, leaves, batch, tangents):
    program, before, after = product.program(leaves, batch)
    return program(before, tangents, after)


def lowered(make, half_of, params, batch, block=None):
    """The primal and the linear half of one microbatch, lowered for CUDA."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = tuple(shapes_of(leaves))
    model = make(treedef, {}, (True,) * len(leaves), False)
    product, kept = product_of(model, half_of, leaves, shapes_of(batch))

    def linear(product, leaves, batch, kept, tangents):
        def one(t):
            return one_product(product.holding(kept), leaves, batch, t)

        return one(tangents) if block is None else jax.vmap(one)(tangents)

    tangents = leaves
    if block is not None:
        tangents = jax.tree.map(lambda x: jax.ShapeDtypeStruct((block, *x.shape), x.dtype), leaves)
    texts = []
    for fun, args in (
        (type(product).evaluate, (product, leaves, batch)),
        (linear, (product, leaves, batch, kept, list(tangents))),
    ):
        traced = jax.jit(fun).trace(*args)
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    return texts


def hessian_map(loss, precision):
    return lambda *args: HessianMap(*args, loss, precision=precision)


@pytest.fixture(scope="module")
def params():
    """Shapes; the model leaves it to NumPy's rules which axes are added."""
    with jax.numpy_rank_promotion("allow"):
        yield jax.eval_shape(lambda: gpt.init(jax.random.key(0), width=32, layers=2))


@pytest.mark.parametrize("block", [None, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("half_of,primal,linear", [
    ("linearized", (2, 3), (6, 6)),
    ("recomputed", (1, 1), (8, 9)),
])  # fmt: skip
def test_products_with_weights_have_no_batch_axes_and_those_of_attention_do(
    half_of, primal, linear, block, params
):
    """Counted as multiples of the model's products: 9 with weights and 4 in attention.

    A product x W gives six in the linear half: of each operand's tangent with the other, in the
    value and in both gradients.
    """
    halves = lowered(hessian_map(gpt.loss, "bf16x3"), half_of, params, BATCH, block)
    for text, times in zip(halves, (primal, linear), strict=True):
        expected = {(SPLIT, False): 9 * times[0], (HIGHEST, True): 4 * times[1]}
        assert products(text) == expected


@pytest.mark.parametrize("precision,name", [("highest", HIGHEST), (None, DEFAULT)])
def test_other_precisions_are_those_of_all_products(precision, name, params):
    for text in lowered(hessian_map(gpt.loss, precision), "linearized", params, BATCH):
        assert {key[0] for key in products(text)} == {name}


def custom_rules():
    """x W and its square, of which the rules make products that are not in the function's trace."""

    @jax.custom_jvp
    def own_jvp(x, w):
        return x @ w

    own_jvp.defjvp(lambda primals, t: (
        primals[0] @ primals[1], t[0] @ primals[1] + primals[0] @ t[1]
    ))  # fmt: skip

    @jax.custom_vjp
    def own_vjp(x, w):
        return x @ w

    own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    return own_jvp, own_vjp


def nested(params, x):
    """Products in every kind of inner program, and with a precision of their own."""
    own_jvp, own_vjp = custom_rules()
    w = params["w"]
    x = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]
    x = jax.checkpoint(lambda x: jnp.tanh(x @ w))(x)
    x = jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ w, lambda x: 2 * (x @ w), x)
    x = jax.jit(lambda x: jnp.sin(x @ w))(x)
    x = own_vjp(own_jvp(x, w), w)
    kernel = w[:3, :3][None, None]
    image = jax.lax.conv_general_dilated(x[None, None], kernel, (1, 1), "SAME")[0, 0]
    named = jnp.matmul(image, w, precision="high")
    wide = jnp.matmul(image.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).astype(jnp.float32)
    return jnp.sum(named**2) + jnp.sum(wide**2)


@pytest.mark.parametrize("setting", [None, "tensorfloat32", "TF32_TF32_F32"])
def test_products_in_inner_programs_and_rules_and_those_that_name_a_precision(setting):
    params, x = {"w": jnp.eye(8)}, jnp.ones((8, 8))
    with jax.default_matmul_precision(setting):
        halves = lowered(hessian_map(nested, "bf16x3"), "recomputed", params, x)
    for text in halves:
        found = products(text)
        # Of float32 without batch axes; named by the loss; convolutions and products in 16 bits.
        assert set(found) == {(SPLIT, False), ("HIGH", False), (HIGHEST, False)}
        for line in text.splitlines():
            if "dot_general" in line and "HIGHEST" in line:
                assert "bf16" in line


@pytest.mark.parametrize("half_of", ["linearized", "recomputed"])
def test_the_setting_is_that_where_the_operator_is_made(half_of, on_device):
    """Of transposes, too."""
    leaves = (jax.ShapeDtypeStruct((8, 8), np.float32),)
    args = (jax.tree.structure({"w": 0}), {}, (True,), False)
    batch = jax.ShapeDtypeStruct((4, 8), np.float32)

    def forward(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"], params["w"]

    loss = cx.losses.LinearCrossEntropy(lambda x: jnp.zeros(len(x), jnp.int32))
    maps = (
        HessianMap(*args, lambda params, x: loss(forward(params, x), x)),
        GaussNewtonMap(*args, forward, loss),
    )
    for model in maps:
        with jax.default_matmul_precision("BF16_BF16_F32_X3"):
            product, kept = product_of(model, half_of, leaves, batch)
        with jax.default_matmul_precision("tensorfloat32"):
            held = product.holding(kept)
            traced = jax.jit(one_product).trace(held, leaves, batch, list(leaves))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        found = products(text)
        assert found[SPLIT, False] > 8 and {key[0] for key in found} <= {SPLIT, HIGHEST}


def test_heads_and_their_own_hessian_products(on_device):
    """The losses' products with a head are products with weights; the sums of the rule are not."""

    def forward(params, batch):
        return batch["x"] @ params["mix"], params["head"]

    loss = cx.losses.LinearCrossEntropy(lambda batch: batch["y"])
    params = {"head": jnp.ones((40, 8)), "mix": jnp.ones((8, 8))}
    batch = {"x": jnp.ones((6, 8)), "y": jnp.zeros(6, jnp.int32)}

    def objective(params, batch):
        return loss(forward(params, batch), batch)

    def gauss_newton(*args):
        return GaussNewtonMap(*args, forward, loss, precision="bf16x3")

    for make, least in ((hessian_map(objective, "bf16x3"), 7), (gauss_newton, 5)):
        for half_of in ("linearized", "recomputed"):
            text = lowered(make, half_of, params, batch)[1]
            sums = [x for x in text.splitlines() if "dot_general" in x and "HIGHEST" in x]
            assert all("= [] x []" in x or "batching_dims" in x for x in sums)
            assert products(text)[SPLIT, False] >= least + 2
            assert DEFAULT not in {key[0] for key in products(text)}


@pytest.mark.parametrize("method", ["autodiff", "finite_difference"])
def test_full_precision_on_a_cpu_changes_no_bit(method, rng):
    params = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    batch = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)

    plain = cx.hessian(loss, params, batch, method=method)
    full = cx.hessian(loss, params, batch, method=method, precision="highest")
    assert np.array_equal((full @ params)["w"], (plain @ params)["w"])
    assert full.precision == "highest" and plain.precision is None
    assert "precision='highest'" in repr(full) and "precision" not in repr(plain)
    moved = full.at({"w": 2 * params["w"]})
    assert moved.precision == "highest"


def quadratic(params, x):
    return jnp.mean((x @ params["w"]) ** 2)


def test_what_cannot_be_had_is_refused_by_name(on_device, monkeypatch):
    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))

    def forward(params, x):
        return x @ params["w"]

    def halved(outputs, x):
        return jnp.mean(outputs**2) / 2

    assert cx.hessian(quadratic, params, x, precision="bf16x3").precision == "bf16x3"
    assert cx.ggn(forward, halved, params, x, precision="bf16x3").precision == "bf16x3"
    with pytest.raises(ValueError, match="'bf16x3' is too little for finite differences"):
        cx.hessian(quadratic, params, x, precision="bf16x3", method="finite_difference")
    monkeypatch.undo()
    for make in (
        lambda **options: cx.hessian(quadratic, params, x, **options),
        lambda **options: cx.ggn(forward, halved, params, x, **options),
    ):
        with pytest.raises(ValueError, match="'bf16x3'.*on a CPU.*take None or 'highest' there"):
            make(precision="bf16x3")
        with pytest.raises(ValueError, match="None or one of 'highest', 'bf16x3', got 'bfloat16'"):
            make(precision="bfloat16")
        with pytest.raises(TypeError, match="precision must be None or one of"):
            make(precision=3)


class Halves(Rewriter):
    """Puts products of parts, added up in float32, in place of those that are asked for as such."""

    def enters(self, eqn):
        return True

    def rewrite(self, jaxpr):
        return jaxpr.replace(eqns=[self.by_hand(eqn) for eqn in jaxpr.eqns])

    def by_hand(self, eqn):
        if eqn.params.get("precision") != jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3:
            return eqn.replace(params=self.params(eqn))
        options = {**eqn.params, "precision": jax.lax.Precision.HIGHEST}

        def upper(x):
            return jax.lax.reduce_precision(x, 8, 7)

        @jax.jit
        def product(a, b):
            dot = functools.partial(jax.lax.dot_general, **options)
            rest = [upper(x - upper(x)) for x in (a, b)]
            return dot(upper(a), upper(b)) + (dot(upper(a), rest[1]) + dot(rest[0], upper(b)))

        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        (call,) = jax.make_jaxpr(product)(*avals).jaxpr.eqns
        return call.replace(invars=eqn.invars, outvars=eqn.outvars)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ByHand(cx.Operator):
    """An operator with its products as a device would make them."""

    inner: cx.Operator
    space: cx.VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block):
        return rewritten(lambda op, v: op.product(v), Halves)(self.inner, block)


def network(dtype):
    rng = np.random.default_rng(0)
    sizes = [(12, 16), (16, 16), (16, 4)]
    params = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, dtype) for s in sizes]
    x, y = (jnp.asarray(rng.normal(size=(32, k)), dtype) for k in (12, 4))

    def loss(params, batch):
        x, y = batch
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ params[-1] - y) ** 2)

    return loss, params, (x, y)


@pytest.fixture(scope="module")
def truth():
    """The Hessian in float64, and its largest absolute eigenvalue."""
    with jax.enable_x64(True):
        op = cx.hessian(*network(np.float64))
        matrix = np.asarray(op.ravel(op @ op.unravel(jnp.eye(op.shape[0]))))
    return matrix, np.abs(np.linalg.eigvalsh(matrix)).max()


def test_the_noise_of_split_products_is_measured_and_raises_the_tolerance(on_device, truth):
    """What the meter says is what products differ by from those in float64, to a factor of 4."""
    matrix, scale = truth
    loss, params, batch = network(np.float32)
    full = cx.hessian(loss, params, batch, linearize=True, precision="highest")
    asked = cx.hessian(loss, params, batch, linearize=True, precision="bf16x3")
    split = ByHand(asked, asked.space)
    options = {"k": 3, "seed": 0, "max_basis": 40, "tol": 1e-6, "max_matvecs": 200}
    plain = cx.eigsh(full, **options)
    with pytest.warns(cx.ConvergenceWarning, match="below what the noise of the products"):
        result = cx.eigsh(split, **options)
    vectors = np.random.default_rng(1).normal(size=(20, len(matrix)))
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    found = split.ravel(result.eigenvectors)
    errors = {}
    for name, op in (("full", full), ("split", split)):
        for v in (vectors, found):
            got = op.ravel(op @ op.unravel(jnp.asarray(v, jnp.float32)))
            wide = np.asarray(jnp.asarray(v, jnp.float32), np.float64) @ matrix
            error = np.linalg.norm(np.asarray(got, np.float64) - wide, axis=1).max() / scale
            errors[name] = max(error, errors.get(name, 0))
    assert 1e-6 < errors["split"] < 1e-4 and errors["split"] > 10 * errors["full"]
    assert errors["split"] / 4 < result.noise < 4 * errors["split"]
    assert result.noise > 5 * plain.noise
    assert np.all(result.tol_effective >= 2e-6) and np.all(result.tol_effective <= 2 * result.noise)
    assert np.all(plain.tol_effective < 2e-6)
    assert np.all(result.residuals[result.converged] <= (result.tol_effective * scale).max())
    values = np.linalg.eigvalsh(matrix)
    for value, bound in zip(result.eigenvalues, result.bounds, strict=True):
        assert np.abs(values - value).min() <= bound + errors["split"] * scale


def noisy(precision):
    """A matrix times vectors that are rounded to bfloat16, and the product that says so."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=(300, 300))
    matrix = jnp.asarray((a + a.T) / 50 + np.diag(np.append([9.0, 8.0], np.zeros(298))), np.float32)
    return cx.from_matvec(
        lambda v: jnp.matmul(matrix, jax.lax.reduce_precision(v, 8, 7), precision=precision), 300
    )


def test_a_setting_that_the_tolerance_does_not_allow_is_named_with_its_remedy(on_device):
    options = {"k": 1, "seed": 0, "tol": 1e-5, "max_basis": 30, "max_matvecs": 80}
    for precision, name in (
        ("BF16_BF16_F32", "BF16_BF16_F32"), ("default", "DEFAULT"), ("highest", None)
    ):  # fmt: skip
        with pytest.warns(cx.ConvergenceWarning, match="noise of the products") as caught:
            cx.eigsh(noisy(precision), **options)
        (text,) = {str(w.message) for w in caught if "noise of the products" in str(w.message)}
        assert (f"in the precision {name}: precision='highest'" in text) == (name is not None)
        assert ("precision" in text) == (name is not None)


def test_on_a_cpu_no_remedy_is_named_as_products_are_full():
    with pytest.warns(cx.ConvergenceWarning, match="noise of the products") as caught:
        cx.eigsh(noisy("default"), 1, seed=0, tol=1e-5, max_basis=30, max_matvecs=80)
    assert not any("precision" in str(w.message) for w in caught)


@pytest.mark.parametrize("n", [40, 300])
def test_an_operator_that_a_setting_makes_asymmetric_is_refused_with_the_remedy(on_device, n):
    a = np.triu(np.ones((n, n), np.float32))  # formed whole, and in the solver
    op = cx.from_matvec(lambda v: jnp.matmul(a, v, precision="default"), n)
    with pytest.raises(ValueError, match="must be symmetric.*precision DEFAULT.*'highest'"):
        cx.eigsh(op, 1, seed=0, max_basis=30 if n == 300 else None)
