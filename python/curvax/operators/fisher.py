"""Fisher matrices, by products with an exact Jacobian and its transpose."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from curvax.checks import check_count, check_seed, seed_word, shown
from curvax.filters import Filter, leaf_names
from curvax.losses.objects import FisherKind, check_kind
from curvax.operators.assembly import CurvatureOptions, assemble
from curvax.operators.batches import Microbatches, Numbered, leading_sizes
from curvax.operators.curvature import Curvature
from curvax.operators.jacobian import SandwichMap, check_callables, check_outputs
from curvax.operators.model import Model, accepts_model
from curvax.operators.products import OuterProducts, Product
from curvax.options import takes_options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fisher(Curvature):
    """A Fisher matrix of the weighted mean loss over all batches, at fixed parameters.

    Attributes:
        kind: `"empirical"`, `"exact"` or `"mc"`.
        num_samples: for `"mc"`, the labels drawn for each of the data's, else None.
        seed: for `"mc"`, that of the draws, else None.
    """

    kind: str = dataclasses.field(default="", metadata={"static": True})
    num_samples: int | None = dataclasses.field(default=None, metadata={"static": True})
    seed: int | None = dataclasses.field(default=None, metadata={"static": True})


class FisherOptions(CurvatureOptions, total=False):
    """Options of `fisher`."""

    kind: FisherKind
    num_samples: int
    seed: int | None


@overload
def fisher(model: Model, /, batches: Any, **options: Unpack[FisherOptions]) -> Fisher: ...
@overload
def fisher(
    forward: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    **options: Unpack[FisherOptions],
) -> Fisher: ...
@accepts_model(lambda model: (model.forward, model.loss, model.params))
@takes_options()
def fisher(
    forward: Callable[[Any, Any], Any] | Model,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    *,
    kind: FisherKind = "empirical",
    num_samples: int = 1,
    seed: int | None = None,
    microbatch_size: Microbatches = None,
    num_batches: int | None = None,
    where: Filter | None = None,
    linearize: bool | Literal["auto"] = "auto",
) -> Fisher:
    """A Fisher matrix `Jᵀ F J` of a model and a loss, as an operator.

    `J` is the exact Jacobian of the outputs in the parameters, and `F` a matrix on the outputs. A
    *sample* is one element of the batch's leading axis; it has one label or, as a sequence has,
    several. With W the sum of all weights (Kunstner et al. 2019, "Limitations of the empirical
    Fisher approximation", for the first two):

    - `"empirical"`: `F = (1/W) Σ_i s_i s_iᵀ` with `s_i` the gradient in the outputs of sample i's
      *total* loss, its mean times its weight. For one label per sample and equal weights, that is
      the mean of the outer products of the samples' gradients. For sequences it is the gradient of
      the sequence's summed loss, and the matrix is per label: where the labels are the model's
      own, its expectation is the exact Fisher matrix.
    - `"exact"`: the expectation over labels drawn from the model, in closed form. For the softmax
      cross entropy it is the Gauss-Newton matrix of the loss without `z_loss`; for the mean squared
      error, the likelihood of a normal variable of variance 1/2, it is the Gauss-Newton matrix.
    - `"mc"`: as `"empirical"`, with `num_samples` sets of labels drawn from the model in place of
      the data's, without `z_loss` and `label_smoothing`. An unbiased estimate of `"exact"`. The
      labels are a function of the seed and the sample's place in the data, and so are the same in
      every product, whatever the microbatches.

    The classes in `curvax.losses` weigh by `sqrt(w_t)` each label's gradient in `s_i`, so that
    labels' weights count once. In the totals of a loss of one's own they count twice: return the
    weight of the labels, as their number, rather than that of importance.

    All are positive semidefinite. A product costs as much as one of `ggn`, and holds a
    microbatch's outputs and activations, and vectors: nothing as long as samples × parameters, but
    for one case. The matrix of a single sample, empirical or with one draw, has rank one. With
    `microbatch_size=1` the operator therefore keeps the gradient of a sample in place of the
    activations where it is no longer than they are, as for long sequences: products then cost a
    pass over those gradients, and no pass through the model.

    Of a `Model`: `fisher(model, batches, ...)`, with the same options.

    Args:
        forward: as for `ggn`.
        loss: as for `ggn`. `"empirical"` takes any: without the method `fisher_product` (see
            `curvax.losses.Loss`) JAX differentiates it on one sample at a time, as
            `loss(outputs[i:i+1], batch[i:i+1])`; all arrays of the outputs and of the batch but
            scalars must then have the samples on their leading axis. A plain mean counts as one
            label per sample. `"exact"` needs `fisher_product`, `"mc"` that or `sample`.
        params: as for `hessian`.
        batches: as for `hessian`; for `"mc"` all arrays of a batch but scalars must have the
            samples on their leading axis.
        kind: the matrix.
        num_samples: for `"mc"`, how many labels to draw for each of the data's; the cost grows with
            it in the loss, not in the model.
        seed: for `"mc"`, that of the draws; None draws one. See the operator's `seed`.
        microbatch_size: as for `hessian`.
        num_batches: as for `hessian`.
        where: as for `hessian`.
        linearize: as for `hessian`.

    Returns:
        The operator.

    Raises:
        TypeError: as for `ggn`, a loss that does not have what `kind` needs, or `num_samples` or
            `seed` is not an integer.
        ValueError: as for `hessian`, an unknown kind, `num_samples` below 1, a negative `seed`,
            either of them for another kind than `"mc"`, or arrays without the axis of samples.
        FloatingPointError: the loss is not finite.
    """
    forward, loss = check_callables(forward, loss)
    check_kind(kind)
    draws, seed = _check_draws(kind, num_samples, seed)
    # An array: another seed is no other program.
    word = None if seed is None else jnp.asarray(seed_word(seed))
    make_map = functools.partial(
        FisherMap, forward=forward, loss=loss, kind=kind, draws=draws, seed=word
    )
    _check_loss(loss, kind)
    op = assemble(
        Fisher,
        make_map,
        params,
        batches,
        microbatch_size=microbatch_size,
        num_batches=num_batches,
        where=where,
        linearize=linearize,
        numbered=kind == "mc",
    )
    return dataclasses.replace(op, kind=kind, num_samples=draws, seed=seed)


def _check_draws(kind: str, num_samples: Any, seed: Any) -> tuple[int | None, int | None]:
    for name, value, low in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if value is None and name == "seed":
            continue
        check_count(name, value, low)
        if kind != "mc" and (name == "seed" or value != 1):
            raise ValueError(
                f"{name} is for kind='mc' only, got {shown(value)} with kind={shown(kind)}"
            )
    if kind != "mc":
        return None, None
    return int(num_samples), check_seed(seed)


def _check_loss(loss: Any, kind: str) -> None:
    needed = {"empirical": (), "exact": ("fisher_product",), "mc": ("fisher_product", "sample")}
    if needed[kind] and not any(hasattr(loss, name) for name in needed[kind]):
        raise TypeError(
            f"kind={kind!r} needs a loss with a method {' or '.join(needed[kind])}: one of "
            "losses.SoftmaxCrossEntropy, losses.LinearCrossEntropy, losses.MeanSquaredError, or "
            f"see losses.Loss; got {shown(loss)}. kind='empirical' takes any loss"
        )


@dataclasses.dataclass(frozen=True)
class FisherMap(SandwichMap):
    """`Jᵀ F J` of one microbatch; for `"mc"` that is a `Numbered`."""

    kind: FisherKind
    draws: int | None
    seed: Array | None

    def keeping(self, leaves: Sequence[Array], batch: Any, limit: float) -> Product | None:
        """See `MicrobatchMap`; the shorter of activations and the gradient of a single sample."""
        primal = self.primal(leaves, batch)
        single = leading_sizes(self.data(batch)) == {1} and self.draws in (None, 1)
        size = sum(leaf.nbytes for leaf in self.taken(leaves))
        shorter = self.kind != "exact" and single and size <= primal.nbytes
        if (size if shorter else primal.nbytes) > limit:
            return None
        if shorter:
            return OuterProducts(self.traced(self._vector, leaves, batch), ())
        return self.linearised(primal, leaves)

    def _vector(
        self, leaves: Sequence[Array], batch: Any
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """The mean, the weight, and the x of the matrix `x xᵀ` of a single sample."""
        (mean, weight), sandwich = self.linear_map(leaves, batch)
        outputs = jax.eval_shape(sandwich.push, self.taken(leaves))
        x = sandwich.pull(_root(sandwich.inner, outputs))
        # A sample without any label has weight 0, and often the mean 0/0.
        return mean, weight, tuple(jnp.where(weight > 0, leaf, jnp.zeros_like(leaf)) for leaf in x)

    def data(self, batch: Any) -> Any:
        """See `SandwichMap`."""
        return batch.data if self.kind == "mc" else batch

    def inner(self, outputs: Any, batch: Any) -> Any:
        """See `SandwichMap`."""
        if self.kind == "mc":
            product = Partial(self._mean_over_draws, outputs, batch)
        elif hasattr(self.loss, "fisher_product"):
            product = Partial(self._own_product, outputs, batch, None)
        else:
            return Partial(_outer_products, *self._gradients(outputs, batch, None))
        jax.eval_shape(product, outputs)  # refused here rather than at the first product
        return product

    def _own_product(self, outputs: Any, batch: Any, keys: Array | None, u: Any) -> Any:
        product = self.loss.fisher_product(outputs, batch, u, self.kind, keys)  # type: ignore[attr-defined]
        return check_outputs("fisher_product", product, u)

    def _mean_over_draws(self, outputs: Any, batch: Numbered, u: Any) -> Any:
        assert self.draws is not None
        assert self.seed is not None
        key = jax.random.key(self.seed, impl="threefry2x32")

        def one(draw: Array) -> Any:
            own = jax.random.fold_in(key, draw)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(own, batch.numbers)
            if hasattr(self.loss, "fisher_product"):
                return self._own_product(outputs, batch.data, keys, u)
            return _outer_products(*self._gradients(outputs, batch.data, keys), u)

        def add(total: Any, draw: Array) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, one(draw)), None

        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf)), u)
        total = jax.lax.scan(add, start, jnp.arange(self.draws, dtype=jnp.uint32))[0]
        return jax.tree.map(lambda t, leaf: (t / self.draws).astype(leaf.dtype), total, u)

    def _gradients(self, outputs: Any, batch: Any, keys: Array | None) -> tuple[Any, Array]:
        """The gradients of the samples' totals, in the form of `_by_sample`; the weight."""
        samples = _count_samples(outputs, batch)

        def total(outputs: Any, batch: Any, key: Array | None) -> tuple[Array, Array]:
            if key is not None:
                fixed = jax.lax.stop_gradient(outputs)
                batch = self.loss.sample(fixed, batch, key)  # type: ignore[attr-defined]
            mean, (_, weight) = self.checked(self.loss(outputs, batch), batch)
            return mean.astype(weight.dtype) * weight, weight

        pieces = jax.tree.map(lambda leaf: leaf[:, None] if leaf.ndim else leaf, batch)
        axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, batch)
        mapped = jax.vmap(total, (0, axes, None if keys is None else 0))

        def sum_of_totals(outputs: Any) -> tuple[Array, Array]:
            totals, weights = mapped(outputs, pieces, keys)
            return jnp.sum(totals), weights

        by_sample = jax.tree.map(lambda leaf: _by_sample(leaf, samples), outputs)
        gradients, weights = jax.grad(sum_of_totals, has_aux=True)(by_sample)
        # A sample without any label has weight 0, and often the mean 0/0.
        counted = weights != 0

        def clear(g: Array) -> Array:
            return jnp.where(counted.reshape(-1, *(1,) * (g.ndim - 1)), g, jnp.zeros_like(g))

        return jax.tree.map(clear, gradients), jnp.sum(weights)


def _by_sample(leaf: Array, samples: int) -> Array:
    """`(N, 1, ...)` from `(N, ...)`, and a copy for each sample of a scalar."""
    return leaf[:, None] if leaf.ndim else jnp.broadcast_to(leaf, (samples,))


def _wide(leaf: Array) -> Any:
    return jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32


def _outer_products(gradients: Any, weight: Array, u: Any) -> Any:
    """`(1/W) Σ_i s_i <s_i, u>`."""
    leaves, treedef = jax.tree.flatten(u)
    rows = [g.astype(_wide(g)).reshape(g.shape[0], -1) for g in jax.tree.leaves(gradients)]
    along = jnp.zeros(rows[0].shape[:1], weight.dtype)
    for g, leaf in zip(rows, leaves, strict=True):
        tangents = _by_sample(leaf.astype(g.dtype), g.shape[0]).reshape(g.shape)
        # Not a sum of products, for which see `losses.objects`.
        along += jnp.einsum("ij,ij->i", g, tangents, precision="highest").astype(along.dtype)
    along /= weight
    products = []
    for g, leaf in zip(rows, leaves, strict=True):
        product = g * along.astype(g.dtype)[:, None]
        product = product.reshape(leaf.shape) if leaf.ndim else jnp.sum(product)
        products.append(product.astype(leaf.dtype))
    return jax.tree.unflatten(treedef, products)


def _root(product: Callable[[Any], Any], like: Any) -> Any:
    """The x of a matrix `x xᵀ` that is known by its products with vectors like `like`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), len(leaves))
    start = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    # The first product is along x. Scaled, since x to the fourth power may underflow.
    along = [
        a.astype(_wide(a)) for a in jax.tree.leaves(product(jax.tree.unflatten(treedef, start)))
    ]
    # What is not finite stays so: the products show it.
    largest = jnp.stack([jnp.max(jnp.abs(a), initial=0) for a in along]).max()
    along = [a / jnp.where(largest == 0, 1, largest) for a in along]
    given = [a.astype(leaf.dtype) for a, leaf in zip(along, leaves, strict=True)]
    again = [
        b.astype(_wide(b)) for b in jax.tree.leaves(product(jax.tree.unflatten(treedef, given)))
    ]
    square = sum(jnp.sum(a * b) for a, b in zip(along, again, strict=True))
    root = [b / jnp.sqrt(jnp.where(square == 0, 1, square)) for b in again]
    narrow = [x.astype(leaf.dtype) for x, leaf in zip(root, leaves, strict=True)]
    return jax.tree.unflatten(treedef, narrow)


def _count_samples(outputs: Any, batch: Any) -> int:
    """The length of the leading axis of all arrays but scalars.

    Raises:
        ValueError: not the same in all.
    """
    count, first = None, ""
    for what, tree in (("batch", batch), ("outputs", outputs)):
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            if not leaf.ndim:
                continue
            place = f"leaf {name!r} of {what}" if name else what
            if count is None:
                count, first = leaf.shape[0], place
            if leaf.shape[0] != count:
                raise ValueError(
                    f"{place} must have the samples on its leading axis, {count} as {first} has, "
                    f"for the gradients of single samples: got shape {leaf.shape}. Do not flatten "
                    "the outputs, close over what is shared, or take a loss with fisher_product"
                )
    if count is None or not any(leaf.ndim for leaf in jax.tree.leaves(outputs)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
        raise ValueError(f"outputs must have an axis of samples, got arrays of shapes {shapes}")
    return int(count)
