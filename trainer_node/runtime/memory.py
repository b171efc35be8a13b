"""How much memory a model takes, told before it is loaded: an allocation that fails ends a process, or the machine swaps."""

from pathlib import Path

from trainer_node.runtime.engine import EngineSpec
from trainer_node.runtime.gguf_file import GgufFile, NotGguf, read_gguf

CACHE_BYTES = 2  # of a number in the cache: F16


def needed_bytes(spec: EngineSpec) -> int:
    """Of weights, adapters and the caches of all slots; 0 where the file cannot be read, which the load will tell."""
    try:
        weights = sum(Path(path).stat().st_size for path in (spec.weights, *spec.adapters))
        return weights + cache_bytes(read_gguf(Path(spec.weights)), spec.num_ctx * spec.parallel)
    except (OSError, NotGguf):
        return 0


def cache_bytes(gguf: GgufFile, tokens: int) -> int:
    """Of keys and values, of every layer, as if none had a shorter window."""
    heads = gguf.length("attention.head_count") or 1
    size = gguf.length("embedding_length") // heads
    width = (gguf.length("attention.key_length") or size) + (gguf.length("attention.value_length") or size)
    return gguf.length("block_count") * (gguf.length("attention.head_count_kv") or heads) * width * tokens * CACHE_BYTES
