"""llama.cpp's tokenizer over a vocabulary: a model of one layer of zeros around it, and all texts in one request."""

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import httpx
import numpy as np

HIDDEN = 32

Tokenize = Callable[[Sequence[str], bool], list[list[int]]]


def write_around(path: Path, name: str, rows: int, vocabulary: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A llama that can be loaded; `vocabulary` writes the tokenizer's keys."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary(writer)
    square = dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"], (HIDDEN, HIDDEN))
    shapes = {f"blk.0.{part}": shape for part, shape in square.items()} | {"token_embd": (rows, HIDDEN)}
    norms = dict.fromkeys(["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"], (HIDDEN,))
    for tensor, shape in {**shapes, **norms}.items():
        writer.add_tensor(f"{tensor}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def served_tokenizer(path: Path, between: int) -> Tokenize:
    """`tokenize(texts, parse_special)` of llama.cpp. `between`: a token that no text gives, put between the texts."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 64, 1, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def tokenize(texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        content = [part for text in texts for part in (between, text)]
        body = {"content": content, "add_special": False, "parse_special": parse_special}
        answer = httpx.post(f"{server.listening_address}/tokenize", json=body, timeout=60, trust_env=False)
        ids: list[list[int]] = []
        for token in answer.raise_for_status().json()["tokens"]:
            if token == between:
                ids.append([])
            else:
                ids[-1].append(token)
        return ids

    return tokenize
