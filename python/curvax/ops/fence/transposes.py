"""Products whose transpose is taken, in the other order: XLA:CPU would transpose what they give.

JAX writes the gradient of a weight as `transpose(y' x)`, or of a sum of such. `x' y` is the same.
"""

import collections
from typing import Any

from curvax.jax_internals import SUMS, Atom, Jaxpr, JaxprEqn, Literal, Var, is_dot, transposed


def without_transposes(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with such products, or sums of them, exchanged where nothing else reads them."""
    producer = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    reads = collections.Counter(
        atom
        for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
        for atom in atoms
        if isinstance(atom, Var)
    )
    exchanged: dict[Var, JaxprEqn] = {}
    dropped: set[Var] = set()
    for eqn in jaxpr.eqns:
        permutation = transposed(eqn)
        if permutation is not None:
            tree = _tree(eqn.invars[0], permutation, producer, reads)
            if tree is not None:
                made = _exchanged(tree, producer)
                made[tree[-1]] = made[tree[-1]].replace(outvars=eqn.outvars)
                exchanged |= made
                dropped.add(eqn.outvars[0])
    if not exchanged:
        return jaxpr
    kept = [
        exchanged.get(eqn.outvars[0], eqn) if eqn.outvars else eqn
        for eqn in jaxpr.eqns
        if not (eqn.outvars and eqn.outvars[0] in dropped)
    ]
    return jaxpr.replace(eqns=kept)


def _tree(
    atom: Atom, permutation: tuple[int, ...], producer: dict[Var, JaxprEqn], reads: Any
) -> list[Var] | None:
    """The values that are to be exchanged, parts first; None if one cannot be."""
    if isinstance(atom, Literal) or reads[atom] != 1 or atom not in producer:
        return None
    eqn = producer[atom]
    if eqn.primitive.name in SUMS:
        parts = [_tree(part, permutation, producer, reads) for part in eqn.invars]
        found = [part for part in parts if part is not None]
        return [*sum(found, []), atom] if len(found) == len(parts) else None
    if not is_dot(eqn):
        return None
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    left: Any = eqn.invars[0].aval
    free = len(left.shape) - len(contracted)
    rank = len(permutation)
    swap = (*range(free, rank), *range(free))
    plain = not batch and eqn.params.get("out_sharding") is None
    return [atom] if plain and tuple(permutation) == swap else None


def _exchanged(tree: list[Var], producer: dict[Var, JaxprEqn]) -> dict[Var, JaxprEqn]:
    """The equations of these values, each of the transpose of what it was."""
    new: dict[Atom, Var] = {}
    made = {}
    for var in tree:
        eqn = producer[var]
        aval: Any = var.aval
        invars, params = list(eqn.invars), eqn.params
        if is_dot(eqn):
            (left, right), _ = params["dimension_numbers"]
            precision = params["precision"]
            if isinstance(precision, tuple):
                precision = precision[::-1]
            dimensions = ((right, left), ((), ()))
            params = {**params, "dimension_numbers": dimensions, "precision": precision}
            invars.reverse()
            first: Any = invars[0].aval
            free = len(first.shape) - len(right)
            rest = len(aval.shape) - free
            shape = (*aval.shape[rest:], *aval.shape[:rest])
        else:
            invars = [new[part] for part in invars]
            part: Any = invars[0].aval
            shape = part.shape
        new[var] = Var(aval.update(shape=shape))
        made[var] = eqn.replace(invars=invars, outvars=[new[var]], params=params)
    return made
