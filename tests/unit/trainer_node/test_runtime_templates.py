"""Messages become the prompt that Ollama would send."""

import pytest

from trainer_node.runtime.answers import cut
from trainer_node.runtime.go_template import GoTemplate, TemplateError
from trainer_node.runtime.templates import CHATML, family_of

SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
ANSWER, AGAIN = {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "More"}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_lookalike_is_rendered_as_chatml_without_a_system_message_of_its_own() -> None:
    family = family_of(SMOLLM2)
    assert family is not None and family.name == "chatml"
    assert GoTemplate(family.template).render([USER]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "jinja", ["", "{{ messages }}", SMOLLM2 + "{# " + "x" * 100 + " #}", SMOLLM2.replace("im_", "turn_of_")[::-1]]
)
def test_another_template_is_left_alone(jinja: str) -> None:
    assert family_of(jinja) is None


def test_neighbours_of_one_role_are_one_message() -> None:
    assert GoTemplate(CHATML).render([USER, {"role": "user", "content": "Ho"}]).count("<|im_start|>user\nHi\n\nHo<|im_end|>") == 1


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (
            "{{ if .System }}S:{{ .System }};{{ end }}{{ range .Messages }}{{ .Role }}:{{ .Content }};{{ end }}",
            "S:Be kind.;system:Be kind.;user:Hi;",
        ),
        ('{{ range .Messages }}{{ if eq .Role "user" }}U{{ else if eq .Role "system" }}S{{ else }}A{{ end }}{{ end }}', "SU"),
        ("{{ range .Messages }}\n{{- .Content -}}\n{{ end }}!", "Be kind.Hi!"),
        ('{{ range .Messages }}{{ if and (ne .Role "system") (not .Tools) }}{{ $.System }}{{ end }}{{ end }}', "Be kind."),
        ("{{/* a comment */}}{{ range $.Messages }}{{ if or .Thinking .Content }}x{{ end }}{{ end }}", "xx"),
        ('{{ range .Messages }}{{ if eq .Content "Be  kind." }}two{{ end }}{{ end }}{{ "<｜a  b｜>\\n\\"" }}', '<｜a  b｜>\n"'),
        ('{{ range .Messages }}{{ .Role }}\u00a0{{- "" }}\n{{- eq .Role "user" }}{{ end }}', "system\u00a0falseuser\u00a0true"),
        ("{{if .System}}a{{else}}b{{end}}{{\nrange\t.Messages -}} c {{end}}", "ac c "),
    ],
)
def test_what_chat_templates_use(template: str, prompt: str) -> None:
    assert GoTemplate(template).render([SYSTEM, USER]) == prompt


TURNS = "{{ if .System }}<s>{{ .System }}</s>{{ end }}<u>{{ .Prompt }}</u><a>{{ .Response }}</a>"


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (TURNS, [USER], "<u>Hi</u><a>"),
        (TURNS, [SYSTEM, USER], "<s>Be kind.</s><u>Hi</u><a>"),
        (TURNS, [SYSTEM, USER, ANSWER, AGAIN], "<s>Be kind.</s><u>Hi</u><a>Ho</a><u>More</u><a>"),
        (TURNS, [USER, ANSWER], "<u>Hi</u><a>Ho"),
        (TURNS, [USER, SYSTEM, AGAIN], "<u>Hi</u><a></a><s>Be kind.</s><u>More</u><a>"),
        (TURNS, [USER, AGAIN], "<u>Hi\n\nMore</u><a>"),
        (TURNS, [USER, {"role": "tool", "content": "x"}], "<u>Hi</u><a>"),
        ("Q: {{ .Prompt }} A: ", [USER, ANSWER, AGAIN], "Q: Hi A: HoQ: More A: "),
        ("{{ .Prompt }}{{ if .Response }}={{ .Response }}.{{ end }}!", [USER, ANSWER, AGAIN], "Hi=Ho.!More"),
        (
            "{{ if .Messages }}{{ range .Messages }}{{ .Content }}{{ end }}{{ else }}{{ .Prompt }}{{ end }}{{ .Response }}",
            [USER, ANSWER],
            "HiHo",
        ),
    ],
)
def test_a_template_without_messages_is_executed_turn_by_turn(template: str, messages: list[dict[str, str]], prompt: str) -> None:
    assert GoTemplate(template).render(messages) == prompt


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ .Nope", "template: :1: unclosed action"),
        ("a\n{{ .System", "template: :2: unclosed action"),
        ("{{ range .Messages }}x", "unexpected EOF"),
        ("{{ if .System }}x", "unexpected EOF"),
        ("x{{ end }}", "unexpected"),
        ("{{ range .Messages }}{{ .Nope }}{{ end }}", "not supported"),
        ("{{ range .Messages }}{{ .Content | upper }}{{ end }}", "not supported"),
        ("{{ range $i, $m := .Messages }}{{ end }}", "not supported"),
        ("{{ range .Messages }}{{ .System }}{{ end }}", "not supported there"),
        ("{{ .Role }}", "not supported there"),
        ("{{ range .Messages }}{{ range .Messages }}x{{ end }}{{ end }}", "not supported there"),
        ("{{ with .System }}x{{ end }}", r"known here: if, else, range \.Messages"),
        ("{{ range .Messages }}x{{ else }}y{{ end }}", "not supported"),
        ("{{ range .Messages }}{{ if (eq .Role }}{{ end }}{{ end }}", "paren|not supported"),
        ('{{ range .Messages }}{{ if eq .Role "user }}x{{ end }}{{ end }}', "not supported as a string"),
        ('{{ .System }}{{ "}}" }}', "not supported as a string"),
        (r'{{ "\x1" }}', "not supported as a string"),
        ("{{ if not }}x{{ end }}", "wrong number of args for not: 0"),
        ("{{ if ne .System }}x{{ end }}", "wrong number of args for ne: 1"),
        ("{{ if .System }}a{{ else }}b{{ else }}c{{ end }}", "unexpected {{else}}"),
        ("{{ if .System }}a{{ elsewhere }}b{{ end }}", "not supported"),
        ("{{ if .System }}a{{ else iffy }}b{{ end }}", "unexpected {{else iffy}}"),
        ("{{/* a }} b */}}{{ .System }}", "unclosed comment"),
        ("{{ .Messages }}", "to print .Messages is not supported"),
    ],
)
def test_what_cannot_be_rendered_rightly_is_refused(template: str, error: str) -> None:
    with pytest.raises(TemplateError, match=error):
        GoTemplate(template)


def test_a_prompt_that_fills_the_context_loses_its_middle() -> None:
    tokens = list(range(910))
    assert cut(tokens, 1024, 4) == tokens
    kept = cut(tokens, 512, 4)
    assert (len(kept), kept[:4], kept[-1]) == (258, [0, 1, 2, 3], 909)
    assert len(cut(tokens, 910, 4)) < 910  # there is no room for an answer
