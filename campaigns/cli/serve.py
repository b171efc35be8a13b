"""`hafs serve`: a model behind an HTTP API."""

from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="A model of the node's server.")] = "hafs-coder",
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's own needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str,
        typer.Option(help="What clients have to send; better in HAFS_API_KEY or keys.toml: others see command lines."),
    ] = "",
    num_ctx: Annotated[int, typer.Option(min=256, help="Tokens of a conversation, its answer included.")] = 4096,
    node: Annotated[str, typer.Option("--node", help="The node whose model server is asked; local is this machine.")] = "local",
) -> None:
    """Put a model behind an OpenAI-compatible API (/v1/chat/completions, /v1/models), with a docs page at /docs."""
    from campaigns import serve as server
    from campaigns.cli import render
    from config.settings import load_settings

    settings = load_settings()
    options = server.ServeOptions(host, port, api_key or settings.key(server.KEY_NAME), num_ctx)
    server.serve(settings, node, model, options, lambda url, full: render.serving(url, full, bool(options.api_key)))
