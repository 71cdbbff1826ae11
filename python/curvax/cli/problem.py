"""A problem: the function that makes it, its arguments, and which operator is wanted of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from curvax.cli.display import seconds_by_part
from curvax.cli.machine import device, kernels, start_jax
from curvax.cli.target import find_target, make_problem, read_parameters, refuse

if TYPE_CHECKING:
    from curvax.operators.curvature import Curvature
    from curvax.operators.model import Model
    from curvax.typing import Batches

_MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "fisher": "Fisher matrix"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a command is asked about.

    Attributes:
        target: MODULE:FUNCTION, a function that returns a `Model` and batches.
        parameters: its arguments.
        operator: hessian, ggn or fisher.
        kind: of a Fisher matrix.
        where: patterns of parameters' names; all parameters if there are none.
        microbatch_size: samples per microbatch.
    """

    target: str
    parameters: dict[str, object] = dataclasses.field(default_factory=dict)
    operator: str = "hessian"
    kind: str | None = None
    where: list[str] = dataclasses.field(default_factory=list)
    microbatch_size: int | None = None

    @property
    def matrix(self) -> str:
        """What the operator is called."""
        return _MATRICES[self.operator]

    def load(self) -> tuple[Curvature, dict[str, str]]:
        """The operator, and the first lines of a command's output; or a refusal."""
        start_jax()
        function = find_target(self.target)
        op = self._operator(*make_problem(self.target, function, self.parameters))
        given = [f"{name}={value!r}" for name, value in self.parameters.items()]
        leaves = len(op.space.names)
        facts = {
            "problem": ", ".join([self.target, *given]),
            "about": (function.__doc__ or "").strip().partition("\n")[0],
            "operator": f"{self.matrix} of {op.shape[0]:,} parameters in "
            f"{leaves} {'leaf' if leaves == 1 else 'leaves'}",
            "loss": f"{float(op.loss):.6g}",
            "construction": seconds_by_part(op.seconds),
            "device": device(),
            "kernels": kernels(),
        }
        return op, {name: fact for name, fact in facts.items() if fact}

    def _operator(self, model: Model, batches: Batches) -> Curvature:
        import curvax as cx

        options: dict[str, Any] = {"microbatch_size": self.microbatch_size}
        if self.where:
            options["where"] = cx.match_names(*self.where)
        if self.operator != "fisher":
            return (cx.hessian if self.operator == "hessian" else cx.ggn)(model, batches, **options)
        if self.kind == "mc":
            options["seed"] = 0
        options["kind"] = self.kind or "empirical"
        return cx.fisher(model, batches, **options)


def problem_of(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="The problem: a function that returns (model, batches), in an importable module "
            "or a file, as my_module:make_problem, problems/mine.py:make_problem, "
            "curvax.models.gpt:make_problem.",
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An argument of the function, as --set tokens=64; may be given repeatedly.",
        ),
    ] = None,
    model: Annotated[
        Literal["gpt", "llama", "smollm2"] | None,
        typer.Option(help="A shipped model: NAME is short for curvax.models.NAME:make_problem."),
    ] = None,
    operator: Annotated[
        Literal["hessian", "ggn", "fisher"],
        typer.Option(help="The Hessian, the Gauss-Newton matrix or the Fisher matrix."),
    ] = "hessian",
    kind: Annotated[
        Literal["empirical", "exact", "mc"] | None,
        typer.Option(help="Which Fisher matrix (with --operator fisher; empirical if not set)."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only parameters whose name matches, as 'blocks.*.attn.*'; may be given "
            "repeatedly.",
        ),
    ] = None,
    microbatch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Samples per microbatch, to bound the memory."),
    ] = None,
) -> Problem:
    """The problem that the options shared by all commands describe."""
    if (target is None) == (model is None):
        refuse("give either MODULE:FUNCTION or --model")
    if kind is not None and operator != "fisher":
        refuse("only with --operator fisher", "--kind")
    return Problem(
        target or f"curvax.models.{model}:make_problem",
        read_parameters(parameters or []),
        operator,
        kind,
        where or [],
        microbatch_size,
    )
