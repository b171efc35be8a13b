"""A control token's text is text wherever a person wrote it, and comes back as it was written."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_node.special_text import MARK, has_special, mark, specials_of, split, stripping_of, unmark

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "ab", "bc", "[INST]"]
PIECES = st.sampled_from([*SPECIALS, "<|im_", "a", "b", "c", "<", "s>", MARK, 2 * MARK, " ", "\n", "x", "é"])
WRITTEN = st.lists(PIECES, max_size=12).map("".join)


@given(WRITTEN)
def test_what_is_marked_holds_no_special_token_and_comes_back(written: str) -> None:
    marked = mark(written, SPECIALS)
    assert not any(special in marked for special in SPECIALS)
    assert unmark(marked) == written


@given(WRITTEN)
def test_what_has_none_is_left_as_it_is(written: str) -> None:
    if MARK not in written and not any(special in written for special in SPECIALS):
        assert mark(written, SPECIALS) == written


@given(st.lists(WRITTEN, min_size=1, max_size=4))
def test_only_the_templates_tokens_are_special(contents: list[str]) -> None:
    rendered = "".join(f"<|im_start|>\n{mark(content, SPECIALS)}<|im_end|>\n" for content in contents)
    parts = split(rendered, SPECIALS)
    assert [text for text, special in parts if special] == ["<|im_start|>", "<|im_end|>"] * len(contents)
    assert "".join(text for text, _ in parts) == "".join(f"<|im_start|>\n{content}<|im_end|>\n" for content in contents)
    assert all(text for text, _ in parts)


def test_white_space_behind_a_token_of_phi_3_goes_with_it() -> None:
    special = ["<s>", "<|user|>", "<|end|>", "<|endoftext|>"]
    stripping = stripping_of("Phi-3 mini", special)
    assert stripping == {"<|user|>", "<|end|>"} and not stripping_of("SmolLM2", special)
    parts = split("<s> a<|user|>\n\t b <|end|>\n<|user|>", special, stripping)
    assert parts == [("<s>", True), (" a", False), ("<|user|>", True), ("b ", False), ("<|end|>", True), ("<|user|>", True)]


@given(st.lists(st.text("ab<|", min_size=2, max_size=4), max_size=8), st.text("ab<|", max_size=12))
def test_what_is_found_is_the_longest_token_at_each_place(specials: list[str], text: str) -> None:
    parts, at = [], 0
    while at < len(text):
        found = max((special for special in specials if text.startswith(special, at)), key=len, default="")
        parts += [found] if found else []
        at += len(found) or 1
    assert [part for part, special in split(text, specials) if special] == parts
    assert has_special(text, specials) == bool(parts)


def test_thousands_of_tokens_are_looked_for_at_once() -> None:
    """Gemma 3 has as many; one after the other they took a second for a page of HTML."""
    specials = frozenset(f"<unused{number}>" for number in range(6000))
    page = "<b>bold</b> and <unused5999 " * 2000
    mark("", specials)
    began = time.process_time()
    assert mark(page, specials) == page and split(page, specials) == [(page, False)]
    assert time.process_time() - began < 0.5


def test_the_longest_token_counts() -> None:
    assert split("<|a|><|a|>!", ["<|a|>", "<|a|>!"]) == [("<|a|>", True), ("<|a|>!", True)]
    assert split("text", []) == [("text", False)] and mark("text", []) == "text"


@pytest.mark.parametrize(("kind", "found"), [(1, ["</s>"]), (3, ["x", "</s>"]), (2, ["x", "</s>"]), (4, ["</s>"])])
def test_special_is_what_llama_cpp_takes_for_it(kind: int, found: list[str]) -> None:
    assert specials_of(["a", "x", "</s>"], [1, kind, 1]) == found, "an end of turn by its name, whatever its type"
