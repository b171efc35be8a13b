"""One small tokenizer of each family, trained here, in a folder as the hub has it: its normalizer, pre-tokenizer and specials.

    folder = write_family("qwen2", tmp_path / "qwen2")

The text it learns from is this repository's style of English, code and a few other scripts, so real merges come out of it.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 900
SPACE = "▁"
CORPUS = [
    "The loop reads a row, checks it and writes it down; nothing is lost that was written, whatever happens to the machine.",
    "def fold(values: list[int], seed: int = 0) -> int:\n    total = seed\n    for value in values:\n"
    "        total += value\n    return total\n",
    "LDA #$0F\nSTA $D020 ; border\nloop:  DEX\n    BNE loop\n    RTS\n",
    "if (a != b && c <= 10) { return x[3] * 2.5e-3; } else { printf(\"%d\\n\", 12345678); }",
    "It's what they're told: we've 3 of 10, I'm sure he'll say; don't, can't, YOU'RE, IT'S.",
    "Grüße aus Köln, señor; naïve café, Ωμέγα, привет мир, 你好，世界, こんにちは, مرحبا, नमस्ते",
    "1 22 333 4444 55555 2026-11-21 3.14159 0xFF 1,000,000",
    "\t\ttabs\n\n\nlines\r\n   three spaces    four     five",
]  # fmt: skip
WHITE = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2028", "\u200b", "\f", "\v"]
ODD = ["👩‍👩‍👧‍👦", "👍🏽", "🇩🇪🇫🇷", "e\u0301", "n\u0303o", "ﬁ", "Å", "½", "²", "Ⅷ", "٣", SPACE, "_", "\ufeff"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, DIGITS = "GPT-2's", "each digit alone"  # no expressions: GPT-2's is a step of its own, behind that of the digits
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNLIKE = "{#- so long that no server takes this template for one that it knows: Ollama compares by edit distance, under 100 #}"
LLAMA3_CHAT = UNLIKE + (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
ZEPHYR_CHAT = UNLIKE + (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_CHAT = UNLIKE + (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Family(NamedTuple):
    """`specials`: control tokens; the roles name some of them. `defined`: tokens that are none, but found in any text."""

    chat: str
    specials: tuple[str, ...]
    bos: str
    eos: str
    pattern: str = ""  # byte pairs; "": SentencePiece
    whole_words: bool = False
    prefix: bool = False  # SentencePiece's space before the text
    adds_bos: bool = False
    nfc: bool = False
    defined: tuple[str, ...] = ()


QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPM_SPECIALS = ("<unk>", "<s>", "</s>")
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
GEMMA_DEFINED = ("\n\n", "\n\n\n", SPACE * 2, SPACE * 3, SPACE * 4, "<table>", "</table>")
PHI_SPECIALS = (*SPM_SPECIALS, "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
FAMILIES = {
    "llama": Family(MISTRAL_CHAT, SPM_SPECIALS, "<s>", "</s>", prefix=True, adds_bos=True),
    "phi4-mini": Family(CHATML, QWEN_SPECIALS, "", "<|im_end|>", O200K),
    "phi4": Family(CHATML, QWEN_SPECIALS, "", "<|im_end|>", LLAMA3),
    "gpt2": Family(CHATML, QWEN_SPECIALS, "", "<|im_end|>", GPT2),
    "smollm": Family(CHATML, QWEN_SPECIALS, "", "<|im_end|>", DIGITS),
    "llama3": Family(LLAMA3_CHAT, LLAMA3_SPECIALS, "<|begin_of_text|>", "<|eot_id|>", LLAMA3, whole_words=True, adds_bos=True),
    "mistral": Family(
        MISTRAL_CHAT, (*SPM_SPECIALS, "[INST]", "[/INST]"), "<s>", "</s>", prefix=True, adds_bos=True, defined=("<t>", "<t>\n")
    ),
    "zephyr": Family(ZEPHYR_CHAT, SPM_SPECIALS, "<s>", "</s>", prefix=True, adds_bos=True),
    "tekken": Family(MISTRAL_CHAT, (*SPM_SPECIALS, "[INST]", "[/INST]"), "<s>", "</s>", TEKKEN, whole_words=True, adds_bos=True),
    "qwen2": Family(CHATML, QWEN_SPECIALS, "", "<|im_end|>", QWEN, nfc=True),
    "qwen3": Family(CHATML, QWEN_SPECIALS, "", "<|im_end|>", QWEN, nfc=True, defined=("<think>", "</think>", "<|fim_pad|>")),
    "gemma2": Family(GEMMA_CHAT, GEMMA_SPECIALS, "<bos>", "<eos>", adds_bos=True, defined=GEMMA_DEFINED),
    "gemma3": Family(
        GEMMA_CHAT, (*GEMMA_SPECIALS, "<start_of_image>"), "<bos>", "<eos>", adds_bos=True, defined=(*GEMMA_DEFINED, "\t\t")
    ),
    "phi3": Family(PHI_CHAT, PHI_SPECIALS, "<s>", "<|endoftext|>", prefix=True),
}


def write_family(name: str, folder: Path) -> Path:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers writes them."""
    family = FAMILIES[name]
    tokenizer = _byte_pairs(family) if family.pattern else _sentencepiece(family)
    if family.adds_bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{family.bos} $A", special_tokens=[bos])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": family.eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    if family.bos:
        config["bos_token"] = {"__type": "AddedToken", "content": family.bos, "special": True}
    if "<unk>" in family.specials:
        config["unk_token"] = "<unk>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(family.chat, encoding="utf-8")
    return folder


def texts(count: int, seed: int, specials: tuple[str, ...]) -> list[str]:
    """Seeded strings: code, digits, white space, emoji, control characters, mixed scripts and special tokens as text."""
    draw = random.Random(seed)
    words = [word for line in CORPUS for word in line.split()]
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x45F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939)]
    ranges += [(0xE01, 0xE30), (0x3041, 0x3096), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x1F1E6, 0x1F1FF)]
    kinds = [
        lambda: draw.choice(words),
        lambda: draw.choice(CORPUS)[draw.randrange(20) : draw.randrange(20, 70)],
        lambda: "".join(draw.choice("0123456789") for _ in range(draw.randrange(1, 12))),
        lambda: draw.choice(WHITE) * draw.randrange(1, 6),
        lambda: "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 8))),
        lambda: draw.choice(ODD),
        lambda: chr(draw.choice([*range(1, 32), 127, 0x85, 0xAD, 0xFFFD, 0x10FFFF, 0xE000])),
        lambda: draw.choice([*specials, "<|im_end|>", "<s>", "</s>", "<0x0A>", "<|", "|>", "<end_of_turn>", "[INST]", "<unk>"]),
        lambda: draw.choice(["'s", "'LL", "I'm", "'T", "x'd", "'ſ", "!!!", "...\n", "=> ", "/*", "//\n", "#", "{}", "\\n"]),
    ]  # fmt: skip
    return ["".join(draw.choice(kinds)() + draw.choice(["", "", " "]) for _ in range(draw.randrange(1, 9))) for _ in range(count)]


def _byte_pairs(family: Family) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=family.whole_words))
    tokenizer.normalizer = normalizers.NFC() if family.nfc else None
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.pattern in (GPT2, DIGITS))]
    if family.pattern == DIGITS:
        steps.insert(0, pre_tokenizers.Digits(True))
    elif family.pattern != GPT2:
        steps.insert(0, pre_tokenizers.Split(Regex(family.pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(CORPUS, trainer)
    _add(tokenizer, family)
    return tokenizer


def _sentencepiece(family: Family) -> Tokenizer:
    """Trained on words that begin with the space; then all pairs that make a piece are merges, as in a converted model."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=SIZE, show_progress=False, min_frequency=1))
    learned = json.loads(learner.to_str())["model"]
    pieces = [token for token, _ in sorted(learned["vocab"].items(), key=lambda item: item[1]) if token not in family.defined]
    made = [left + right for left, right in learned["merges"] if left + right not in family.defined]
    first = [token for token in family.specials if token in (*SPM_SPECIALS, *GEMMA_SPECIALS)]
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *made, *(token for token in pieces if token not in set(made))]
    vocabulary = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    known = set(pieces)
    runs_first = _pairs([token for token in family.defined if not token.strip(f"{SPACE}\n\t")], {*family.defined, *known})
    merges = sorted(runs_first, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True) + _pairs(made, known)
    vocabulary |= {token: len(vocabulary) + at for at, token in enumerate(dict.fromkeys(map("".join, runs_first)))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(SPACE)] if family.prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    words = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*words, decoders.Strip(" ", 1, 0)] if family.prefix else words)
    if not family.prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    _add(tokenizer, family)
    return tokenizer


def _pairs(tokens: list[str], known: set[str]) -> list[tuple[str, str]]:
    return [(t[:cut], t[cut:]) for t in tokens for cut in range(1, len(t)) if t[:cut] in known and t[cut:] in known]


def _add(tokenizer: Tokenizer, family: Family) -> None:
    strips = "<|user|>" in family.specials
    for token in family.specials:
        keeps = token in ("<unk>", "<s>", "<|endoftext|>")
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=strips and not keeps)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.defined])
