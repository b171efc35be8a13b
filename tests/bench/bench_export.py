"""Merging an adapter into 1.5 billion parameters and writing them as F16, against PEFT's merge_and_unload and save_pretrained.

    python tests/bench/bench_export.py [ROUNDS] [FOLDER]       (3; a temporary folder, 10 GB)

The model is random, in the sizes of a Qwen2 of 1.5B, bf16 in shards of 1 GB; the adapter has rank 16 on every linear layer. Each
run is a process of its own, started anew, in turns. Seconds are the process's, imports and fsync included. VmHWM is the most
memory that the process ever had, mappings included; the bound is 1.2 GB and the largest tensor in float32.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, ROWS, RANK = 1536, 8960, 28, 12, 2, 151_936, 16
LARGEST_BYTES = ROWS * HIDDEN * 4
BOUND_BYTES = 1.2e9 + LARGEST_BYTES
OURS = """
from pathlib import Path; import sys
from trainer_node.export.merged import export_merged
base, adapter, target = map(Path, sys.argv[1:])
export_merged(base, adapter, target / "merged.gguf", lambda done, size: None)
"""
PEFT = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
"""
PEAK = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def make_base(folder: Path) -> Path:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tests.fakes.family_tokenizers import write_family

    write_family("qwen2", folder)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, options).save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


def measure(code: str, folder: Path, base: Path) -> tuple[float, float]:
    """Seconds, and the process's peak memory in GB."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        begin = time.perf_counter()
        words = [sys.executable, "-c", code + PEAK, str(base), str(base / "adapter"), target]
        done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        return time.perf_counter() - begin, int(done.stdout.split()[-1]) * 1024 / 1e9


def main(rounds: int = 3, where: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "make", str(folder / "base")], check=True)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / 1e9
        print(f"{size / 2:.2f} billion parameters; largest tensor {LARGEST_BYTES / 1e9:.2f} GB in float32")
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(measure(OURS, folder, folder / "base"))
            theirs.append(measure(PEFT, folder, folder / "base"))
        print(json.dumps({"hafs": ours, "peft": theirs}))
    seconds = [statistics.median(run[0] for run in runs) for runs in (ours, theirs)]
    peak = [max(run[1] for run in runs) for runs in (ours, theirs)]
    print(f"hafs  {seconds[0]:6.1f} s, VmHWM {peak[0]:.2f} GB (at most {BOUND_BYTES / 1e9:.2f})")
    print(f"peft  {seconds[1]:6.1f} s, VmHWM {peak[1]:.2f} GB")
    print(f"x{seconds[1] / seconds[0]:.2f} as fast (at least 2)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make_base(Path(sys.argv[2]))
    else:
        main(*(int(word) for word in sys.argv[1:2]), *sys.argv[2:3])
