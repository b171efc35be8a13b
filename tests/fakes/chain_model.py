"""A model that says what a test wants: a llama whose one block adds nothing, so the next token depends on the present one alone.

Its tokenizer and template are SmolLM2's, with two pieces of its own: WORD, and a template token's text without its end.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from tests.fakes.tiny_model import MERGES_FROM, VOCABULARY, smollm2_gguf

HIDDEN, FEED_FORWARD, HEADS = 64, 64, 2
END, NEWLINE, FULL_STOP, CLOSE = 2, 198, 30, 46  # <|im_end|>, and what stands behind the word "assistant"
WORD, OPENED = 1000, 1001
STRENGTH = 5.0

GOOD = {NEWLINE: WORD, WORD: FULL_STOP, FULL_STOP: END}
ENDLESS = {NEWLINE: WORD, WORD: WORD}
EMPTY = {NEWLINE: END}
LEAKING = {NEWLINE: OPENED, OPENED: CLOSE, CLOSE: END}


def write_chain(
    path: Path, chain: dict[int, int], *, word: str = "Because", opened: str = "<|im_start|", template: str = ""
) -> Path:
    """Write the GGUF (about 1 MB, float32).

    Args:
        chain: the token that follows each token; after any other one anything may follow.
        template: instead of SmolLM2's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("chain")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, {WORD: word, OPENED: opened}, template)
    for name, values in _tensors(chain).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    merges: list[str]
    template: str


@cache
def _vocabulary() -> Vocabulary:
    """The first pieces of SmolLM2's. Read once: that takes seconds."""
    fields = gguf.GGUFReader(smollm2_gguf()).fields
    return Vocabulary(
        fields["tokenizer.ggml.tokens"].contents(slice(0, VOCABULARY)),
        fields["tokenizer.ggml.token_type"].contents(slice(0, VOCABULARY)),
        fields["tokenizer.ggml.merges"].contents(slice(0, VOCABULARY - MERGES_FROM)),
        fields["tokenizer.chat_template"].contents(),
    )


def _add_tokenizer(writer: gguf.GGUFWriter, own: dict[int, str], template: str) -> None:
    source = _vocabulary()
    tokens = [own.get(number, text) for number, text in enumerate(source.tokens)]
    kept = set(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(source.types)
    writer.add_token_merges([merge for merge in source.merges if merge.replace(" ", "", 1) in kept])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template or source.template)


def _tensors(chain: dict[int, int]) -> dict[str, np.ndarray]:
    """The embedding of a token, normed, is what the output is made of: nothing is added on the way."""
    embedding = np.random.default_rng(1).normal(0, 1, (VOCABULARY, HIDDEN)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    output = np.zeros((VOCABULARY, HIDDEN), np.float32)
    for present, following in chain.items():
        output[following] += STRENGTH * embedding[present]
    ones, square = np.ones(HIDDEN, np.float32), np.zeros((HIDDEN, HIDDEN), np.float32)
    block = {"attn_norm": ones, "ffn_norm": ones}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), square)
    whole = {"token_embd.weight": embedding, "output_norm.weight": ones, "output.weight": output}
    return whole | {f"blk.0.{name}.weight": values for name, values in block.items()}
