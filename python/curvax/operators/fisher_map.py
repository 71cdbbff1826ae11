"""What multiplies by the Fisher matrix of one microbatch: by activations, or by gradients."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from curvax.arrays import shares
from curvax.losses.objects import FisherKind
from curvax.operators.batches import Numbered, leading_sizes
from curvax.operators.closure import Closed
from curvax.operators.jacobian import SandwichMap, check_outputs
from curvax.operators.model_of_sample import ModelOfSample, tell_unknown
from curvax.operators.outer_products import (
    by_sample,
    count_samples,
    outer_products,
    root,
    wide,
)
from curvax.operators.products import OuterProducts, Product
from curvax.operators.sample_rules import MixedError, Sample, UnfollowedError, Value
from curvax.typing import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class FisherMap(SandwichMap):
    """`Jᵀ F J` of one microbatch; for `"mc"` that is a `Numbered`."""

    kind: FisherKind
    draws: int | None
    seed: Array | None

    def keeping(self, leaves: Sequence[Array], batch: Batch, limit: float) -> Product | None:
        """See `MicrobatchMap`; the samples' gradients where a product with them is the faster."""
        primal = self.primal(leaves, batch)
        # A product reads them twice, and does no more; by each number of the residuals it
        # multiplies a row of weights.
        most = min(limit, 2.0 * primal.nbytes)
        gradients = self._gradients_of_samples(leaves, batch, most)
        if gradients is not None:
            return OuterProducts(gradients, ())
        return self.linearised(primal, leaves) if primal.nbytes <= limit else None

    def _gradients_of_samples(
        self, leaves: Sequence[Array], batch: Batch, most: float
    ) -> Closed | None:
        """The mean, the weight, and vectors x of the matrix `Σ x xᵀ`, on a leading axis.

        None if they need more than `most` bytes, or the samples are not known to be apart.
        """
        lengths = leading_sizes(self.data(batch))
        size = sum(leaf.nbytes for leaf in self.taken(leaves)) * (self.draws or 1)
        if self.kind == "exact" or len(lengths) != 1 or size * max(lengths) > most:
            return None
        if lengths == {1}:
            return self.traced(self._vectors_of_one, leaves, batch)
        if _on_several_devices((leaves, batch)):  # which work on parts of the samples
            return None
        try:
            return self.traced(self._vectors_of_each, leaves, batch)
        except MixedError:
            return None
        except UnfollowedError as unknown:
            tell_unknown(str(unknown))
            return None

    def _vectors_of_one(self, leaves: Sequence[Array], batch: Batch) -> PyTree:
        """As `_gradients_of_samples`, of a batch of a single sample."""
        outputs, _, pull = self.jacobian(leaves, self.data(batch))
        return self._vectors(outputs, pull, batch)

    def _vectors_of_each(self, leaves: Sequence[Array], batch: Batch) -> PyTree:
        """As `_gradients_of_samples`, where the samples do not mix; of one at a time.

        Raises:
            MixedError: they mix.
            UnfollowedError: they may.
        """
        model = ModelOfSample.of(self, leaves, self.data(batch))

        def one(index: Array) -> tuple[Array, PyTree]:
            sample = Sample(model.count, index)
            own = jax.tree.map(
                lambda leaf: sample.part(Value(leaf), 0).array if leaf.ndim else leaf, batch
            )
            outputs, pull, loss = model(sample, self.data(own))
            _, weight, vectors = dataclasses.replace(self, loss=loss)._vectors(outputs, pull, own)
            return weight, vectors

        mean, weight = self.evaluate(leaves, batch)
        weights, vectors = jax.lax.map(one, jnp.arange(model.count, dtype=jnp.int32))
        # As in `shares` of microbatches: a weight itself may leave the range.
        scale = jnp.sqrt(jnp.where(weights > 0, shares(weights, jnp.sum(weights)), 0))
        rows = [x * scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) for x in vectors]
        return mean, weight, [x.reshape(-1, *x.shape[2:]) for x in rows]

    def _vectors(
        self, outputs: PyTree, pull: Callable[[PyTree], list[Array]], batch: Batch
    ) -> tuple[Array, Array, list[Array]]:
        """Of a single sample: the mean, the weight, and its vectors, on a leading axis."""
        data = self.data(batch)
        mean, weight = self.checked(self.loss(outputs, data), data)[1]
        if self.draws is None:
            x = [leaf[None] for leaf in pull(root(self.inner(outputs, batch), outputs))]
        else:
            x = jax.lax.map(
                lambda draw: pull(root(Partial(self._of_draw, outputs, batch, draw), outputs)),
                jnp.arange(self.draws, dtype=jnp.uint32),
            )
            x = [leaf / jnp.sqrt(self.draws).astype(leaf.dtype) for leaf in x]
        # A sample without any label has weight 0, and often the mean 0/0.
        return mean, weight, [jnp.where(weight > 0, leaf, jnp.zeros_like(leaf)) for leaf in x]

    def data(self, batch: Batch) -> PyTree:
        """See `SandwichMap`."""
        return batch.data if self.kind == "mc" else batch

    def inner(self, outputs: PyTree, batch: Batch) -> PyTree:
        """See `SandwichMap`."""
        if self.kind == "mc":
            product = Partial(self._mean_over_draws, outputs, batch)
        elif hasattr(self.loss, "fisher_product"):
            product = Partial(self._own_product, outputs, batch, None)
        else:
            return Partial(outer_products, *self._gradients(outputs, batch, None))
        jax.eval_shape(product, outputs)  # refused here rather than at the first product
        return product

    def _own_product(self, outputs: PyTree, batch: Batch, keys: Array | None, u: PyTree) -> PyTree:
        product = self.loss.fisher_product(outputs, batch, u, self.kind, keys)  # type: ignore[attr-defined]
        return check_outputs("fisher_product", product, u)

    def _of_draw(self, outputs: PyTree, batch: Numbered, draw: Array, u: PyTree) -> PyTree:
        assert self.seed is not None
        own = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), draw)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, batch.numbers)
        if hasattr(self.loss, "fisher_product"):
            return self._own_product(outputs, batch.data, keys, u)
        return outer_products(*self._gradients(outputs, batch.data, keys), u)

    def _mean_over_draws(self, outputs: PyTree, batch: Numbered, u: PyTree) -> PyTree:
        assert self.draws is not None

        def add(total: PyTree, draw: Array) -> tuple[PyTree, None]:
            one = self._of_draw(outputs, batch, draw, u)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, one), None

        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf)), u)
        total = jax.lax.scan(add, start, jnp.arange(self.draws, dtype=jnp.uint32))[0]
        return jax.tree.map(lambda t, leaf: (t / self.draws).astype(leaf.dtype), total, u)

    def _gradients(self, outputs: PyTree, batch: Batch, keys: Array | None) -> tuple[PyTree, Array]:
        """The gradients of the samples' totals, in the form of `by_sample`; the weight."""
        samples = count_samples(outputs, batch)

        def total(outputs: PyTree, batch: Batch, key: Array | None) -> tuple[Array, Array]:
            if key is not None:
                fixed = jax.lax.stop_gradient(outputs)
                batch = self.loss.sample(fixed, batch, key)  # type: ignore[attr-defined]
            mean, (_, weight) = self.checked(self.loss(outputs, batch), batch)
            return mean.astype(weight.dtype) * weight, weight

        pieces = jax.tree.map(lambda leaf: leaf[:, None] if leaf.ndim else leaf, batch)
        axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, batch)
        mapped = jax.vmap(total, (0, axes, None if keys is None else 0))

        def sum_of_totals(outputs: PyTree) -> tuple[Array, Array]:
            totals, weights = mapped(outputs, pieces, keys)
            return jnp.sum(totals), weights

        apart = jax.tree.map(lambda leaf: by_sample(leaf, samples), outputs)
        gradients, weights = jax.grad(sum_of_totals, has_aux=True)(apart)
        # A sample without any label has weight 0, and often the mean 0/0.
        counted = weights != 0

        def clear(g: Array) -> Array:
            return jnp.where(counted.reshape(-1, *(1,) * (g.ndim - 1)), g, jnp.zeros_like(g))

        return jax.tree.map(clear, gradients), jnp.sum(weights)


def _on_several_devices(tree: PyTree) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, jax.core.Tracer)]
    return any(len(leaf.devices()) > 1 for leaf in arrays)
