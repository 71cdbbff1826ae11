"""How far a converted model is from its source."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.adapters.gradients import NOISE, Gradients, distances, norm
from curvax.filters import leaf_names
from curvax.jax_internals import AnyJaxpr
from curvax.operators.closure import Closed, close
from curvax.operators.hessian import hessian
from curvax.operators.model import Model
from curvax.ops.fence import fence
from curvax.program import compiler_options
from curvax.typing import Batch, Params, PyTree, PyTreeDef


class _Tolerances(NamedTuple):
    """Largest differences allowed, relative to the source's.

    Two correct programs differ by rounding alone, of some thousand operations in depth.

    Attributes:
        outputs: of outputs and loss.
        products: of gradients, leaf by leaf, and products, in norm.
        differences: of products against central differences, in norm.
    """

    outputs: float
    products: float
    differences: float


# By the bits of the coarsest floating point type that a model computes in.
_TOLERANCES = {
    64: _Tolerances(1e-10, 1e-8, 1e-6),
    32: _Tolerances(1e-4, 1e-3, 3e-2),
    16: _Tolerances(5e-2, 0.3, 1.0),
}


class SourceValues(NamedTuple):
    """What a source computes on a batch.

    Attributes:
        outputs: a pytree of NumPy arrays, as `forward` returns them.
        loss: the mean.
        gradient: of the loss, leaves by name.
        bits: of the loss, which may be coarser than the model.
    """

    outputs: PyTree
    loss: float
    gradient: Mapping[str, PyTree]
    bits: int = 64


class Source(Protocol):
    """A model where it came from."""

    framework: str

    def evaluate(self, batch: Batch) -> SourceValues:
        """Outputs, loss and gradient, by the framework's own differentiation."""
        ...

    def derivatives(self, batch: Batch, vector: Mapping[str, PyTree]) -> "SourceDerivatives | None":
        """By the framework's own differentiation; None if it has none but JAX's."""
        ...


@dataclasses.dataclass(frozen=True)
class SourceDerivatives:
    """Leaves by name.

    Attributes:
        product: of the Hessian with a vector; None if the framework has no second derivative of an
            operation.
        differences: computes the same product by central differences of the gradient.
    """

    product: Mapping[str, PyTree] | None
    differences: Callable[[], Mapping[str, PyTree]]


@dataclasses.dataclass(frozen=True, repr=False)
class Verification:
    """How far a model is from its source, on one batch.

    Attributes:
        outputs: the largest difference of an output, relative to the largest output.
        loss: the difference of the losses, relative to the source's.
        gradient: the norm of the difference of the gradients, relative to the source's.
        leaf_gradient: the same of the leaf where that is largest, relative to the leaf's own
            gradient, or to 1/256 of the whole where the leaf's is less.
        leaf: the name of that leaf.
        hvp: as `gradient`, of Hessian-vector products with a random vector; None if not asked for.
        reference: what the product was compared with.
        tolerances: the largest allowed of each, by the names above.
    """

    outputs: float
    loss: float
    gradient: float
    leaf_gradient: float
    leaf: str
    hvp: float | None
    reference: str | None
    tolerances: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether none is larger than allowed."""
        return not self.failures()

    def failures(self) -> list[str]:
        """What is larger than allowed, or NaN, in words."""
        found = []
        for name, allowed in self.tolerances.items():
            value = getattr(self, name)
            if value is not None and not value <= allowed:
                what = f"gradient of {self.leaf!r}" if name == "leaf_gradient" else name
                found.append(f"{what} by {value:.2e} (allowed {allowed:.0e})")
        return found

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        parts = [
            f"outputs {self.outputs:.1e}",
            f"loss {self.loss:.1e}",
            f"gradient {self.gradient:.1e} (of {self.leaf} {self.leaf_gradient:.1e})",
        ]
        if self.hvp is not None:
            parts.append(f"Hessian-vector product {self.hvp:.1e} against {self.reference}")
        return f"relative differences: {', '.join(parts)}"


class UndifferentiableError(TypeError):
    """JAX has no derivative of an operation of a model."""


class VerificationError(ValueError):
    """A model does not compute what its source computes."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model beside its source on one batch.

    Attributes:
        model: the converted model.
        source: where it came from.
        batch: of JAX arrays.
        tol: of gradients and products; None for the defaults, which grow where rounding errors of
            the parameters alone change a gradient by more.
    """

    model: Model
    source: Source
    batch: Batch
    tol: float | None

    def measure(self, hvp: bool, seed: int) -> Verification | None:
        """The differences; None of a batch in which nothing counts.

        Raises:
            UndifferentiableError: JAX has no derivative of an operation.
            VerificationError: the outputs are others in structure or shape.
        """
        # The source first: of a batch that does not fit, its own words are the best.
        theirs = self.source.evaluate(self.batch)
        program = self._program()
        (loss, (weight, outputs)), gradient = program(self.model.params)
        if float(weight) == 0:
            return None
        limits = _TOLERANCES[min(theirs.bits, _coarsest_bits(program.function.traced.jaxpr))]
        limits = limits._replace(products=self.tol or limits.products)
        allowed = {"outputs": limits.outputs, "loss": limits.outputs}
        differences = self._outputs(outputs, theirs.outputs)
        losses = _relative(loss, theirs.loss)
        found = Gradients.of(self._leaves(gradient), theirs.gradient, limits.products)
        close = max(differences) <= limits.outputs and losses <= limits.outputs
        if self.tol is None and not (close and found.passed):
            again = program(_nudged(self.model.params))
            noise = self._outputs(again[0][1][1], jax.tree.map(np.asarray, outputs))
            worst = int(np.argmax(np.divide(differences, np.maximum(noise, limits.outputs))))
            differences = [differences[worst]]
            allowed["outputs"] = max(limits.outputs, NOISE * noise[worst])
            noise_of_loss = abs(float(again[0][0]) - float(loss)) / (abs(theirs.loss) or 1.0)
            allowed["loss"] = max(limits.outputs, NOISE * noise_of_loss)
            noise_of_leaves = distances(self._leaves(again[1]), self._leaves(gradient))
            found = dataclasses.replace(found, noise=noise_of_leaves)
        difference = max(differences)
        allowed["gradient"] = found.allowed_of_whole
        allowed["leaf_gradient"] = found.allowed_of_leaf
        measured = Verification(
            difference, losses, found.whole, found.of_leaf, found.leaf, None, None, allowed
        )
        if not hvp or difference > allowed["outputs"] or losses > allowed["loss"]:
            return measured
        product, reference, limit = self._product(limits, seed)
        allowed = {**allowed, "hvp": limit}
        return dataclasses.replace(measured, hvp=product, reference=reference, tolerances=allowed)

    def _program(self) -> "_Program":
        """Outputs, loss and gradient; whether that has a derivative is traced too."""

        def evaluate(params: Params, batch: Batch) -> PyTree:
            outputs = self.model.forward(params, batch)
            loss = self.model.loss(outputs, batch)
            mean, weight = loss if isinstance(loss, tuple) else (loss, 1)
            return jnp.reshape(mean, ()), (weight, outputs)

        gradient = fence(jax.value_and_grad(evaluate, has_aux=True))
        params = self.model.params
        try:
            # A module's constants are arguments: XLA would hold, and fold, frozen weights again.
            program = _Program(close(gradient, params, self.batch), self.batch)
            _trace_derivative(program, params)
        except NotImplementedError as error:
            raise UndifferentiableError(str(error).partition("\n")[0]) from error
        return program

    def _outputs(self, ours: PyTree, theirs: PyTree) -> list[float]:
        """The relative difference of each output."""
        leaves, wanted = jax.tree.leaves(ours), jax.tree.leaves(theirs)
        structure: PyTreeDef = jax.tree.structure(ours)
        wanted_structure: PyTreeDef = jax.tree.structure(theirs)
        shapes = [[np.shape(leaf) for leaf in tree] for tree in (leaves, wanted)]
        if structure != wanted_structure or shapes[0] != shapes[1]:
            raise VerificationError(
                f"the converted model returns outputs of shapes {shapes[0]} ({structure}), the "
                f"{self.source.framework} model {shapes[1]} ({wanted_structure})"
            )
        return [_relative(a, b) for a, b in zip(leaves, wanted, strict=True)] or [0.0]

    def _leaves(self, tree: PyTree) -> dict[str, PyTree]:
        names = leaf_names(self.model.params)
        return dict(zip(names, map(np.asarray, jax.tree.leaves(tree)), strict=True))

    def _product(self, limits: _Tolerances, seed: int) -> tuple[float, str, float]:
        """The difference of products, what they were compared with, and the largest allowed."""
        parts = (self.model.objective, self.model.params, self.batch)
        op = hessian(*parts)
        flat = np.random.default_rng(seed).standard_normal(op.shape[0]).astype(op.dtype)
        vector = op.unravel(jnp.asarray(flat))
        product = op.ravel(op @ vector)
        names = leaf_names(self.model.params)
        named = {n: np.asarray(x) for n, x in zip(names, jax.tree.leaves(vector), strict=True)}
        derivatives = self.source.derivatives(self.batch, named)
        allowed, framework = limits.products, self.source.framework
        if derivatives is None:
            differences: Any = hessian(*parts, method="finite_difference")
            allowed = max(allowed, 3 * float(differences.relative_error))
            distance = _distance(product, op.ravel(differences @ vector))
            return distance, "central differences", allowed

        def flattened(leaves: Mapping[str, PyTree]) -> PyTree:
            return np.concatenate([np.ravel(leaves[name]) for name in names])

        judged = f"central differences of {framework}'s gradient"
        if derivatives.product is None:
            judge = flattened(derivatives.differences())
            return _distance(product, judge), judged, max(allowed, limits.differences)
        theirs = flattened(derivatives.product)
        hvp = _distance(product, theirs)
        if not hvp <= allowed:
            judge = flattened(derivatives.differences())
            right, wrong = _distance(product, judge), _distance(theirs, judge)
            if right <= limits.differences < wrong:
                warnings.warn(
                    f"{framework}'s own double backward is wrong for this model: it differs from "
                    f"central differences of {framework}'s own gradient by {wrong:.1e} relative, "
                    f"and the converted model's product by {right:.1e}",
                    stacklevel=4,
                )
                return right, judged, limits.differences
        return hvp, f"{framework}'s own double backward", allowed


@dataclasses.dataclass(frozen=True)
class _Program:
    """`((loss, (weight, outputs)), gradient)` of parameters.

    Attributes:
        function: of the parameters and the batch.
        batch: the batch.
    """

    function: Closed
    batch: Batch

    def __call__(self, params: Params) -> PyTree:
        args = (self.function, params, self.batch)
        return jax.jit(Closed.__call__, compiler_options=compiler_options(*args))(*args)


def _trace_derivative(program: _Program, params: Params) -> None:
    """Trace the derivative of a gradient, to learn whether there is one.

    Raises:
        NotImplementedError: there is none.
    """

    def results(given: PyTree) -> list[Array]:
        leaves = jax.tree.leaves(program.function(given, program.batch))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def squares(given: PyTree) -> Array | int:
        return sum(jnp.sum(leaf**2) for leaf in results(given))

    try:
        jax.eval_shape(lambda given: jax.jvp(results, (given,), (given,)), params)
    except (TypeError, ValueError) as error:  # as of callbacks, and of rules by custom_vjp
        try:
            jax.eval_shape(jax.grad(squares), params)
        except (TypeError, ValueError):
            raise NotImplementedError(str(error)) from error


def _nudged(params: Params) -> PyTree:
    """Parameters with rounding errors."""
    random = np.random.default_rng(0)

    def one(leaf: Array) -> PyTree:
        size = 4 * jnp.finfo(leaf.dtype).eps * (jnp.abs(leaf) + jnp.mean(jnp.abs(leaf)))
        return leaf + size * jnp.asarray(random.choice([-1, 1], leaf.shape), leaf.dtype)

    return jax.tree.map(one, params)


def _coarsest_bits(jaxpr: AnyJaxpr) -> int:
    """The bits of the coarsest floating point numbers that a program computes."""
    found = {64}

    def visit(jaxpr: AnyJaxpr) -> None:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                dtype = getattr(variable.aval, "dtype", None)
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                    found.add(max(16, jnp.finfo(dtype).bits))
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr)
    return min(found)


def _distance(ours: PyTree, theirs: PyTree) -> float:
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    return norm(a - b) / max(norm(b), float(np.finfo(np.float64).tiny))


def _relative(ours: PyTree, theirs: PyTree) -> float:
    if np.array_equal(ours, theirs):  # as the weights of a head are, which are large
        return 0.0
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    scale = np.abs(b).max(initial=0)
    return float(np.abs(a - b).max(initial=0) / (scale or 1.0))
