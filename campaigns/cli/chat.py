"""`hafs chat`: talk to a model."""

from typing import Annotated

import typer


def chat(
    model: Annotated[str, typer.Argument(help="A model of the node's server.")] = "hafs-coder",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Ask this, print the answer and end.")] = "",
    system: Annotated[str, typer.Option(help="A system message; without it the one that the model was trained with.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    num_ctx: Annotated[int, typer.Option(min=256, help="Tokens of the whole conversation.")] = 4096,
    node: Annotated[str, typer.Option("--node", help="The node whose model server is asked; local is this machine.")] = "local",
) -> None:
    """Talk to your model. The model server of this machine is started if need be; an empty line ends the conversation."""
    from agents.task import Sampling
    from campaigns.cli.chat_live import ask, converse
    from config.contracts.sample import Message
    from config.settings import load_settings

    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, num_ctx=num_ctx)
    history = [Message(role="system", content=system)] if system else []
    if prompt:
        ask(load_settings(), node, model, [*history, Message(role="user", content=prompt)], sampling)
    else:
        converse(load_settings(), node, model, history, sampling)
