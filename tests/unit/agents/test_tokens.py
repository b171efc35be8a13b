import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from agents import tokens
from config.contracts.sample import Message


def messages(*texts: str) -> list[Message]:
    return [Message(role="user", content=text) for text in texts]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer, as those of GPT, Llama 3, Qwen and SmolLM, that merges all it can."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    text = [
        "LDA #$10 loads the A register with the immediate value $10. It sets the N and Z flags; don't ask why 65816 123456"
    ] * 9
    made.train_from_iterator(text, BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=ByteLevel.alphabet()))
    return made


WORDS = st.sampled_from(
    ["LDA", "loads", "the", "value", "don't", "register", "65816", "$10", "(", ");", " ", "\n", "日本", "é", "🙂"]
)


@given(st.text() | st.lists(WORDS).map("".join) | st.lists(WORDS).map(" ".join))
def test_the_true_count_lies_between_the_bounds(tokenizer: Tokenizer, text: str) -> None:
    count = len(tokenizer.encode(text).ids)
    assert tokens.at_least(messages(text)) <= count <= tokens.at_most(messages(text))


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        # prompt_eval_count of a real Ollama server with SmolLM2, template tokens included
        (["What is the capital of France?"], 16),
        (["Answer in one word.", "What is the capital of France?", "Paris", "And of Italy?"], 42),
        (["Name three colors."], 13),
    ],
)
def test_counts_of_a_real_server_lie_between_the_bounds(texts: list[str], count: int) -> None:
    assert tokens.at_least(messages(*texts)) <= count <= tokens.at_most(messages(*texts))


def test_the_lower_bound_is_of_use() -> None:
    assert tokens.at_least(messages("word " * 900)) == 900
    assert tokens.at_least(messages("LDA #$10", "a b")) == 4


@pytest.mark.parametrize(
    ("provider", "model", "budget", "most"),
    [
        ("gemini", "gemini-2.5-flash", None, 0),
        ("gemini", "gemini-2.5-pro", None, 128),
        ("gemini", "gemini-2.5-flash", 512, 512),
        ("gemini", "gemini-2.5-flash", -1, 24_576),
        ("gemini", "gemini-2.5-pro", -1, 32_768),
        ("openai", "o4-mini", None, 0),
    ],
)
def test_thinking_that_may_come_on_top(provider: str, model: str, budget: int | None, most: int) -> None:
    assert tokens.thinking_at_most(provider, model, budget) == most
