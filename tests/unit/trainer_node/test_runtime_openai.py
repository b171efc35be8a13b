"""A request of OpenAI's chat API becomes one of Ollama's."""

import pytest

from trainer_node.runtime.models import ApiError
from trainer_node.runtime.openai import chat_request

HI = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0}),
        ({"temperature": 0, "top_p": 0.5, "seed": 7}, {"temperature": 0, "top_p": 0.5, "seed": 7}),
        ({"max_tokens": 5, "stop": "x"}, {"temperature": 1.0, "top_p": 1.0, "num_predict": 5, "stop": ["x"]}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"temperature": 1.0, "top_p": 1.0, "num_predict": 6}),
        (
            {"stop": ["x", "y"], "presence_penalty": 1},
            {"temperature": 1.0, "top_p": 1.0, "stop": ["x", "y"], "presence_penalty": 1},
        ),
    ],
)
def test_sampling_parameters_become_options(given: dict[str, object], options: dict[str, object]) -> None:
    assert chat_request({"model": "m", "messages": [HI], **given})["options"] == options


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, SCHEMA),
    ],
)
def test_a_response_format_is_a_format(asked: object, expected: object) -> None:
    assert chat_request({"messages": [HI], "response_format": asked})["format"] == expected


def test_parts_of_text_are_joined() -> None:
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat_request({"messages": [{"role": "user", "content": content}]})["messages"] == [
        {"role": "user", "content": "one\ntwo"}
    ]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "too short"),
        ({"messages": []}, "too short"),
        ({"messages": "hi"}, "too short"),
        ({"messages": ["hi"]}, "invalid message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text"),
        ({"messages": [HI], "response_format": "json"}, "response_format"),
        ({"messages": [HI], "response_format": {"type": "json_schema", "json_schema": "x"}}, "field json_schema of type object"),
    ],
)
def test_what_cannot_be_asked_is_refused(body: dict[str, object], error: str) -> None:
    with pytest.raises(ApiError, match=error) as caught:
        chat_request(body)
    assert caught.value.status == 400
