"""The commands that this package adds to `disco-serve`, found through the entry points in pyproject.toml."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from classifiers.distill.options import DistillOptions
from classifiers.one_line import fail, one_line_errors

_DEFAULT = DistillOptions(target="", out=Path())


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def distill_draft(
    target: Annotated[str, typer.Option(help="The model to make a draft for.")],
    out: Annotated[
        Path, typer.Option(help="Directory of the draft; a killed run goes on from what is there.")
    ],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="User messages for half of the text: one a line, or .jsonl with 'prompt'. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same draft.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the target: auto, float32 or bfloat16.")] = "auto",
    text_tokens: Annotated[
        int, typer.Option(help="Tokens of the target's text to make.")
    ] = _DEFAULT.text_tokens,
    rows: Annotated[int, typer.Option(help="Documents written at once.")] = _DEFAULT.rows,
    length: Annotated[int, typer.Option(help="Tokens of a row of documents.")] = _DEFAULT.length,
    answer_tokens: Annotated[int, typer.Option(help="The longest answer.")] = _DEFAULT.answer_tokens,
    temperatures: Annotated[str, typer.Option(help="Drawn from for each document; 0 is greedy.")] = _listed(
        _DEFAULT.temperatures
    ),
    init: Annotated[
        str, typer.Option(help="pca, or layers:I,J,...: copies of these layers of the target.")
    ] = _DEFAULT.init,
    hidden: Annotated[int, typer.Option(help="Width.")] = _DEFAULT.hidden,
    layers: Annotated[int, typer.Option(help="Layers.")] = _DEFAULT.layers,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = _DEFAULT.heads,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = _DEFAULT.kv_heads,
    intermediate: Annotated[int, typer.Option(help="Width of the MLP.")] = _DEFAULT.intermediate,
    embed_rank: Annotated[
        int, typer.Option(min=0, help="Rank of the input embedding; 0: full.")
    ] = _DEFAULT.embed_rank or 0,
    draft_vocab: Annotated[
        int, typer.Option(min=0, help="Tokens that the head knows, the most frequent; 0: all.")
    ] = _DEFAULT.draft_vocab or 0,
    weights: Annotated[str, typer.Option(help="As saved: bfloat16, int8 or float32.")] = _DEFAULT.weights,
    train_tokens: Annotated[int, typer.Option(help="Token passes of training.")] = _DEFAULT.train_tokens,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = _DEFAULT.batch_tokens,
    matrix_lr: Annotated[
        float, typer.Option(help="Learning rate of the layers' matrices (Muon).")
    ] = _DEFAULT.matrix_lr,
    other_lr: Annotated[float, typer.Option(help="Learning rate of the rest (AdamW).")] = _DEFAULT.other_lr,
    finish_from: Annotated[
        float, typer.Option(help="Share of the steps after which total variation is trained on.")
    ] = _DEFAULT.finish_from,
    finish_temperatures: Annotated[
        str, typer.Option(help="At which laws are compared then; low ones are what greedy requests see.")
    ] = _listed(_DEFAULT.finish_temperatures),
    eval_per_category: Annotated[
        int | None, typer.Option(help="Held-out prompts of a category; default: all.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of a held-out answer.")] = _DEFAULT.eval_tokens,
    eval_every: Annotated[
        int, typer.Option(help="Steps between looks at the held-out prompts.")
    ] = _DEFAULT.eval_every,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Between checkpoints.")
    ] = _DEFAULT.checkpoint_minutes,
    stop_after_minutes: Annotated[
        float | None, typer.Option(help="Stop then, to go on with the same command later (exit code 3).")
    ] = None,
) -> None:
    """Make a small draft for a target out of the target's own text."""
    from classifiers.distill.run import distill

    given = locals() | {
        "temperatures": _numbers("--temperatures", temperatures),
        "finish_temperatures": _numbers("--finish-temperatures", finish_temperatures),
        "embed_rank": embed_rank or None,
        "draft_vocab": draft_vocab or None,
        "prompts": tuple(prompts or ()),
    }
    options = DistillOptions(**{name: given[name] for name in DistillOptions.__struct_fields__})
    with one_line_errors("--rows or --batch-tokens", "weights"):
        if not distill(options, shlex.join(["disco-serve", *sys.argv[1:]])):
            raise typer.Exit(3)


def bench_pair(
    target: Annotated[str, typer.Option(help="The model that is served.")],
    draft: Annotated[str, typer.Option(help="default, self:N or a model.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help=".jsonl with 'category' and 'prompt' or 'text', or .txt, one a line. Repeatable."),
    ] = None,
    per_category: Annotated[int | None, typer.Option(help="Prompts of a category; default: all.")] = None,
    tokens: Annotated[int, typer.Option(help="The longest answer.")] = 128,
    sl: Annotated[int, typer.Option(help="The largest lookahead.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled texts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the report as JSON.")] = None,
) -> None:
    """Judge a pair: what a draft step costs, how often it is right, and what that would gain."""
    from classifiers.pair import PairOptions, run

    given = locals() | {"prompts": tuple(prompts or ())}
    with one_line_errors("--rows or --batch-tokens", "weights"):
        run(PairOptions(**{name: given[name] for name in PairOptions.__struct_fields__}))


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        fail(f"{name} {text!r}: numbers set apart by commas", 2)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("distill-draft")(distill_draft)
app.command("bench-pair")(bench_pair)

if __name__ == "__main__":
    app()
