"""SmolLM2 in place of a problem of one's own: `--model smollm2` and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from curvax.cli.machine import device, kernels, start_jax
from curvax.cli.problem import operator_of

ModelName = Annotated[
    Literal["smollm2"] | None,
    typer.Option(
        help="In place of MODULE:FUNCTION: SmolLM2-135M-Instruct, with weights rounded to "
        "four bits."
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        min=2, metavar="N", help="With --model: tokens of the text; one predicts the next."
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        readable=True,
        help="With --model: text to analyse, in place of a paragraph of our own.",
    ),
]


def check_source(target: str | None, model: str | None) -> None:
    """Refuse both a problem of one's own and a model of ours, or neither."""
    if (target is None) == (model is None):
        raise typer.BadParameter(
            "give either MODULE:FUNCTION or --model", param_hint="MODULE:FUNCTION"
        )


def smollm2_operator(
    length: int,
    text: Path | None,
    operator: str,
    kind: Any,
    where: list[str] | None,
    microbatch_size: int | None,
) -> Any:
    """The operator of the model on so many tokens of a text."""
    import jax.numpy as jnp

    import curvax as cx
    from curvax.models import llama, smollm2

    start_jax()
    if text is None:
        batch = smollm2.batch(length)
    else:
        ids = smollm2.tokenizer().encode(text.read_text()).ids
        if len(ids) < length:
            raise ValueError(f"--text has {len(ids)} tokens, fewer than --tokens {length}")
        batch = jnp.asarray([ids[:length]], jnp.int32)
    params, config = smollm2.load()
    model = cx.Model(
        params,
        lambda p, b: llama.outputs(p, b[:, :-1], config),
        cx.losses.LinearCrossEntropy(labels=lambda b: b[:, 1:]),
    )
    return operator_of(model, batch, operator, kind, where, microbatch_size)


def smollm2_facts(op: Any, tokens: int) -> dict[str, str]:
    """The first lines of a command's output."""
    return {
        "model": f"SmolLM2-135M-Instruct with Q4_1-rounded weights, {op.shape[0]:,} parameters",
        "text": f"{tokens} tokens, {tokens - 1} predicted",
        "loss": f"{float(op.loss):.4f} nats/token",
        "device": device(),
        "kernels": kernels(),
    }
