"""Memory for a training: what the node's model server holds is unloaded before, and what it loads meanwhile is told.

- The answer to an unload proves nothing: a model is gone once /api/ps lists it no more, and then the driver says what is free.
- What is in the way is named, never ended: it may be anybody's. What is loaded again before training begins is unloaded again.
- A server that is not there holds nothing, and one on another machine holds nothing here. Ollama and hafs's own runtime are one
  and the same.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import BadRequest, LeaseLost, ProviderUnavailable, StoreError
from trainer_node.gpu import card_memory
from trainer_node.ollama import OllamaApi
from trainer_node.periodic import every
from trainer_node.runtime.launch import RuntimeInfo, find_server, is_of_this_machine

WATCH_S = 5.0  # between two looks while a model is trained

log = logging.getLogger("hafs")


def in_the_way(root: Path, needed_mb: float) -> str:
    """What holds the memory that a training needs, in words; "" once it is free. The server is asked to unload all it holds.

    Args:
        needed_mb: memory of the GPU, in MB of 2**20 bytes; 0 where none is trained on. More than there is, is not waited for.
    """
    return _held_by_server(_server_here(root)) or _missing_on_gpu(needed_mb)


@contextmanager
def watched(root: Path, tell: Callable[[str], None], every_s: float = WATCH_S) -> Iterator[None]:
    """Tell during the block what models the server has loaded, each time they change; "" when all have gone."""
    seen: set[str] = set()

    def look() -> None:
        nonlocal seen
        seen = _told(root, seen, tell)

    with every(every_s, look, name="model-server-watch"):
        yield


def _server_here(root: Path) -> RuntimeInfo | None:
    """The node's model server, unless OLLAMA_HOST names another machine."""
    server = find_server(root)
    return server if server and is_of_this_machine(server.url) else None


def _held_by_server(server: RuntimeInfo | None) -> str:
    if server is None:
        return ""
    try:
        with OllamaApi(server.url) as api:
            held = [_asked_to_go(api, name) for name in api.loaded()]
    except ProviderUnavailable as error:
        return f"{_name(server)}, which does not say what it holds: {error}"
    return f"{_name(server)}, which still holds {', '.join(held)}" if held else ""


def _asked_to_go(api: OllamaApi, model: str) -> str:
    try:
        api.ask_to_unload(model)
    except BadRequest as refused:  # deleted while Ollama has it loaded: it goes when its time is over
        return f"{model} ({refused})"
    return model


def _missing_on_gpu(needed_mb: float) -> str:
    memory = card_memory() if needed_mb else None
    needed = needed_mb * 2**20
    if memory is None or not memory.free < needed <= memory.total:
        return ""
    who = memory.holder or "a process whose name is not shown"
    holder = f"; most is held by {who} (process {memory.holder_pid})" if memory.holder_pid else ""
    return f"{needed / 1e9:.1f} GB of GPU memory, of which {memory.free / 1e9:.1f} GB are free{holder}"


def _told(root: Path, seen: set[str], tell: Callable[[str], None]) -> set[str]:
    """What is loaded now; `seen` is what was at the last look. A look that fails shows nothing new."""
    try:
        server = _server_here(root)
        if server is None:
            loaded = set()
        else:
            with OllamaApi(server.url) as api:
                loaded = set(api.loaded())
            for model in sorted(loaded - seen):
                log.warning("%s was loaded into %s: it takes memory from the training", model, _name(server))
        if loaded != seen:
            tell(f"loaded meanwhile, and shares the memory: {', '.join(sorted(loaded))}" if loaded else "")
    except (ProviderUnavailable, StoreError, LeaseLost) as error:
        log.warning("cannot tell what the model server holds: %s", error)
        return seen
    return loaded


def _name(server: RuntimeInfo) -> str:
    return f"{'the model server of hafs' if server.embedded else 'Ollama'} at {server.url}"
