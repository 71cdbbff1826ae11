"""Functions of torch written in JAX, against dense references in float64 and against torch."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)

from curvax.adapters.torch.tensor_products import attention, grouped_mm, linear  # noqa: E402

pytestmark = pytest.mark.frameworks

ENDS = {
    "even": [2, 4, 6, 8],
    "uneven, the first empty": [0, 1, 7, 8],
    "all in one": [0, 8, 8, 8],
    "rows beyond the last": [3, 3, 5, 6],
    "nothing at all": [0, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def groups(ends):
    return list(zip([0, *ends[:-1]], ends, strict=True))


def dense(a, b, ends):
    """By a product for each group."""
    if a.ndim == 2 and b.ndim == 3:
        out = jnp.zeros((a.shape[0], b.shape[2]))
        for i, (start, end) in enumerate(groups(ends)):
            out = out.at[start:end].set(a[start:end] @ b[i])
        return out
    if a.ndim == 3 and b.ndim == 2:
        return dense(b.T, a.swapaxes(1, 2), ends).T
    return jnp.stack([a[:, start:end] @ b[start:end] for start, end in groups(ends)])


SHAPES = {
    "2D x 3D": ((8, 5), (4, 5, 3)),
    "3D x 2D": ((4, 3, 5), (5, 8)),
    "2D x 2D": ((3, 8), (8, 5)),
}


def same_derivatives(ours, reference, args, seed=0):
    """Values, and second derivatives in each mode, with several tangents at once."""
    rng = np.random.default_rng(seed)
    tangents = tuple(jnp.asarray(rng.standard_normal((3, *x.shape))) for x in args)
    one = tuple(t[0] for t in tangents)

    def derivatives(function):
        def loss(args):
            return jnp.sum(jnp.sin(function(*args)))

        def along(t):
            return jax.jvp(jax.grad(loss), (args,), (t,))

        _, linear = jax.linearize(jax.grad(loss), args)
        return (
            function(*args),
            along(one),
            jax.vmap(along)(tangents),
            jax.vmap(linear)(tangents),
            jax.grad(lambda p: jax.jvp(loss, (p,), (one,))[1])(args),
            jax.vjp(jax.grad(loss), args)[1](one),
        )

    found, wanted = jax.jit(lambda: (derivatives(ours), derivatives(reference)))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("case", ENDS)
def test_grouped_products(shapes, case):
    rng = np.random.default_rng(1)
    ends = ENDS[case]
    args = tuple(jnp.asarray(rng.standard_normal(shape)) for shape in SHAPES[shapes])
    offs = jnp.asarray(ends, jnp.int32)
    same_derivatives(lambda a, b: grouped_mm(a, b, offs), lambda a, b: dense(a, b, ends), args)


def test_grouped_products_of_transposed_weights_and_of_equal_groups():
    rng = np.random.default_rng(2)
    rows, weights = (jnp.asarray(rng.standard_normal(s)) for s in ((7, 5), (3, 4, 5)))
    ends = [4, 4, 7]
    offs = jnp.asarray(ends, jnp.int32)
    same_derivatives(
        lambda a, b: grouped_mm(a, b.swapaxes(1, 2), offs),
        lambda a, b: dense(a, b.swapaxes(1, 2), ends),
        (rows, weights),
    )
    left = jnp.asarray(rng.standard_normal((3, 2, 4)))
    np.testing.assert_allclose(grouped_mm(left, weights), jnp.matmul(left, weights), rtol=1e-14)


@pytest.mark.parametrize("shapes", SHAPES)
def test_grouped_products_are_those_of_torch(shapes):
    """In float32, the widest that torch's take, with rows of 16 bytes."""
    sizes = {"2D x 3D": ((8, 4), (4, 4, 8)), "3D x 2D": ((4, 4, 4), (4, 8))}
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator) for s in sizes.get(shapes, ((4, 8), (8, 4))))
    offs = torch.tensor([1, 1, 6, 8], dtype=torch.int32)
    theirs = torch.nn.functional.grouped_mm(a, b, offs=offs)
    ours = grouped_mm(*(jnp.asarray(x.numpy()) for x in (a, b, offs)))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_the_work_of_grouped_products_does_not_grow_with_the_groups():
    def flops(groups):
        shapes = [((256, 64), jnp.float32), ((groups, 64, 32), jnp.float32), ((groups,), jnp.int32)]
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return jax.jit(grouped_mm).lower(*args).compile().cost_analysis()["flops"]

    assert flops(32) <= 1.5 * flops(4) <= 1.5 * 2.5 * (2 * 256 * 64 * 32)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool, a row masked whole": {"attn_mask": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_that_of_torch(case, heads):
    """Outputs and double backward."""
    options = dict(MASKS[case])
    if "attn_mask" in options:
        options["attn_mask"] = torch.tensor(options["attn_mask"], dtype=torch.bool)
    check_attention(options | {"enable_gqa": heads != 4}, heads)


def test_attention_with_masks_of_numbers():
    """A bias with a derivative of its own, and rows of -inf or of the lowest number."""
    bias = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    bias[0, :, 1] = -math.inf
    bias[1, :, 2, :3] = -math.inf
    check_attention({"attn_mask": bias}, 4)
    bias = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    bias[0, :, 1] = torch.finfo(torch.float64).min
    check_attention({"attn_mask": bias}, 4)


def check_attention(options, heads):
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    names = ["query", "key", "value"]
    tensors = [random(2, 4, 3, 6), random(2, heads, 5, 6), random(2, heads, 5, 7)]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        names, tensors = [*names, "attn_mask"], [*tensors, mask]
    options = {key: value for key, value in options.items() if key not in names}
    tangents = [random(*x.shape) for x in tensors]

    leaves = [x.clone().requires_grad_() for x in tensors]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            **dict(zip(names, leaves, strict=True)), **options
        )
    gradient = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(gradient, tangents, strict=True))
    products = torch.autograd.grad(along, leaves)

    arrays = {k: jnp.asarray(v) for k, v in options.items() if isinstance(v, torch.Tensor)}
    fixed = options | arrays

    def loss(*args):
        found = attention(**dict(zip(names, args, strict=True)), **fixed)
        return jnp.sin(found).sum(), found

    def both(args, tangents):
        gradient = jax.grad(loss, range(len(names)), has_aux=True)
        return jax.jvp(gradient, args, tangents, has_aux=False)

    (first, found), (second, _) = jax.jit(both)(
        *(tuple(jnp.asarray(x.numpy()) for x in xs) for xs in (tensors, tangents))
    )
    for ours, theirs in zip((found, *first, *second), (out, *gradient, *products), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_dropout_within_attention_is_refused():
    x = jnp.ones((1, 2, 3))
    with pytest.raises(ValueError, match=r"must compute the same in every call.*dropout_p=0\.1"):
        attention(x, x, x, dropout_p=0.1)


@pytest.mark.parametrize("shape,outputs", [((4, 3), (2,)), ((2, 4, 3), (5,)), ((3,), (2,))])
def test_linear_by_the_names_of_torch(shape, outputs):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal(shape), rng.standard_normal((*outputs, 3))
    for bias in (None, rng.standard_normal(outputs)):
        given = {"input": x, "weight": weight} | ({} if bias is None else {"bias": bias})
        want = torch.nn.functional.linear(**{k: torch.as_tensor(v) for k, v in given.items()})
        got = linear(**{k: jnp.asarray(v) for k, v in given.items()})
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-12)
