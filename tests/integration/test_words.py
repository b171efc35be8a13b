"""Training and the embedded runtime have the same tokens for the same chat, whatever a person writes in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from config.contracts.sample import Message
from tests.fakes.family_tokenizers import FAMILIES, SPACE, texts
from tests.fakes.leftovers import end_nodes
from tests.fakes.tiny_folders import TINY, write_folder
from trainer_node.base_model import served_gguf
from trainer_node.dataset import Encoded, Row
from trainer_node.ollama import OllamaApi, register_gguf
from trainer_node.runtime.launch import ensure_runtime
from trainer_node.train.agreement import require_agreement
from trainer_node.train.base import load_tokenizer, read_base
from trainer_node.train.encode import encode

pytestmark = pytest.mark.integration

BASES = ("llama", "llama-llama3", "mistral", "qwen3", "gemma2", "phi3")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaApi]:
    root = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAFS_RUNTIME", "embedded")
        with OllamaApi(ensure_runtime(root).url) as client:
            yield client
    end_nodes(root)


def rows(tokenizer: Any, specials: tuple[str, ...]) -> list[Encoded]:
    """Plain chats, chats that quote control tokens in every role, and a chat with a history."""
    written = [text for text in texts(12, 5, specials) if text.strip()]
    system, quoted = Message(role="system", content="Be brief."), "".join(specials)
    chats = [(system, Message(role="user", content=text)) for text in ("Why?", *written, f"{quoted} and {specials[-1]}\n")]
    asked, answered = Message(role="user", content="Why?"), Message(role="assistant", content=f"So. {specials[-1]}")
    chats += [(system, asked, answered, asked), (Message(role="system", content=quoted), asked)]
    return [encode(tokenizer, Row(f"s{number}", chat, ("Because 2 + 2 is 4.",))) for number, chat in enumerate(chats)]


@pytest.mark.parametrize("name", BASES)
def test_the_same_chat_has_the_same_tokens(name: str, api: OllamaApi, tmp_path: Path) -> None:
    base = read_base(write_folder(name, tmp_path / name))
    register_gguf(api, name, served_gguf(base.path, base.sha256, tmp_path / "cache", lambda done, total: None))
    encoded = rows(load_tokenizer(base), FAMILIES[TINY[name].tokenizer].specials)
    quoting = sum(row.quotes for row in encoded)
    assert 3 <= quoting < len(encoded)
    told = require_agreement(api, name, encoded, lambda done, total: None)
    assert told.startswith(f"{len(encoded) - quoting} rows have the same tokens") and f"{quoting} more quote" in told
    whole = next(row for row in reversed(encoded) if row.quotes and len(row.row.messages) == 2)
    assert served_ids(api, name, whole)[: len(whole.prompt_ids)] == whole.prompt_ids


def test_an_answer_behind_a_line_of_text_is_trained_as_it_is_served(api: OllamaApi, tmp_path: Path) -> None:
    """Its roles are no control tokens and its tokenizer puts a space before every text, but not before the answer."""
    folder = write_folder("llama", tmp_path / "zephyr")
    (folder / "chat_template.jinja").write_text(FAMILIES["zephyr"].chat, encoding="utf-8")
    base = read_base(folder)
    register_gguf(api, "zephyr", served_gguf(base.path, base.sha256, tmp_path / "cache", lambda done, total: None))
    tokenizer = load_tokenizer(base)
    encoded = rows(tokenizer, FAMILIES["zephyr"].specials)
    assert "same tokens" in require_agreement(api, "zephyr", encoded, lambda done, total: None)
    plain = next(row for row in encoded if not row.quotes)
    first = tokenizer.convert_ids_to_tokens(plain.answer_ids[0][:1])
    assert plain.lead and not first[0].startswith(SPACE)
    assert api.tokenize("zephyr", plain.prompt + plain.answers[0]) == plain.prompt_ids + plain.answer_ids[0]


def served_ids(api: OllamaApi, model: str, row: Encoded) -> list[int]:
    """The ids that the server itself says it has read, and what it answered."""
    system, asked = (message.content for message in row.row.messages)
    body = {"model": model, "system": system, "prompt": asked, "stream": False, "options": {"num_predict": 1}}
    return list(httpx.post(f"{api.url}/api/generate", json=body, timeout=60, trust_env=False).json()["context"])
