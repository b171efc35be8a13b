"""`hafs chat`: talk to a model."""

from pathlib import Path
from typing import Annotated

import typer


def chat(
    model: Annotated[str, typer.Argument(help="A model of the node's server.")] = "hafs-coder",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer and end; - reads it from stdin.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--input", help="Answer many: JSONL with prompt or messages (also id, system), or one prompt a line."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL for the answers of --input; a second run continues it.")] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Prompts of --input at once; without it what the server bears.")
    ] = None,
    system: Annotated[str, typer.Option(help="A system message; without it the one that the model was trained with.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Of the likeliest tokens so many, 0 for all; without it the server's own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    num_ctx: Annotated[int, typer.Option(min=256, help="Tokens of the whole conversation.")] = 4096,
    node: Annotated[str, typer.Option("--node", help="The node whose model server is asked; local is this machine.")] = "local",
) -> None:
    """Talk to your model. The model server of this machine is started if need be; /help lists what else can be typed."""
    from agents.task import Sampling
    from campaigns.cli import chat_live, chat_many
    from config.settings import load_settings

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, num_ctx=num_ctx)
    if file or output or parallel:
        files = chat_many.file_pair(file, output, prompt)
        chat_many.ask_many(load_settings(), node, model, system, files, parallel, sampling)
    elif prompt is not None:
        chat_live.ask_one(load_settings(), node, model, system, prompt, sampling)
    else:
        chat_live.converse(load_settings(), node, model, system, sampling)
