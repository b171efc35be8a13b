"""llama.cpp in this process, asked for the log-probabilities of the token that follows each of some prompts.

It gives none for a token that ends inside a character, so the next token is forced; the probabilities are those before that.
"""

import json
from pathlib import Path

import httpx
import numpy as np
import xllamacpp


def served_logprobs(
    model: Path, ids: list[int], ends: list[int], *, forced: int, top: int, adapter: Path | None = None, context: int = 256
) -> list[dict[int, float]]:
    """For each of `ends` the `top` likeliest tokens after ids[:end].

    Args:
        forced: id of a token that is a whole character.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.port, params.warmup = context, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    body = {"n_predict": 1, "temperature": 0, "n_probs": top, "cache_prompt": True, "logit_bias": [[forced, 1e4]]}
    found = []
    with httpx.Client(base_url=server.listening_address, timeout=60) as client:
        for end in ends:
            reply = client.post("/completion", json=body | {"prompt": ids[:end]}).json()
            entries = reply["completion_probabilities"][0]["top_logprobs"]
            found.append({int(entry["id"]): float(entry["logprob"]) for entry in entries})
    return found


def require_equal(served: dict[int, float], expected: np.ndarray) -> float:
    """Assert one position: the largest difference is 1e-2 of the position's range at most, and a clear favourite is the same.

    Returns:
        That difference as a share of the range.
    """
    ids = np.array(list(served))
    width = float(expected.max() - expected.min())
    worst = float(np.abs(expected[ids] - np.array(list(served.values()))).max())
    assert worst <= 1e-2 * width, f"differs by {worst:.4f} where the range is {width:.2f}"
    second, first = np.partition(expected, -2)[-2:]
    if first - second > 2 * worst:
        assert max(served, key=lambda id_: served[id_]) == expected.argmax()
    return worst / width


def whole_character(tokenizer_json: Path) -> int:
    """The id of `e`."""
    return int(json.loads(tokenizer_json.read_bytes())["model"]["vocab"]["e"])
