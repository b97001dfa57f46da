"""LangChain's OpenAI classes against a real server: text, streams, batches, tools, structured output."""

import pytest

langchain_openai = pytest.importorskip("langchain_openai", reason='pip install -e ".[clients]"')

TALE = "tell me the tale of the wolf and the lamb"


def chat(server, **options):
    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", temperature=0, max_retries=0, **options
    )


def test_chat_and_stream(server):
    model = chat(server, max_tokens=60)
    whole = model.invoke(TALE)
    assert "Wolf" in whole.content
    assert whole.usage_metadata["output_tokens"] == 60
    assert "".join(chunk.content for chunk in model.stream(TALE)) == whole.content
    assert [answer.content for answer in model.batch([TALE, TALE])] == [whole.content] * 2


def test_completions(server):
    model = langchain_openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", temperature=0, max_tokens=10, max_retries=0
    )
    text = model.invoke("Once upon a time")
    assert text.startswith(" there was")
    assert model.generate(["Once upon a time", "The fox"]).generations[0][0].text == text
    assert "".join(model.stream("Once upon a time")) == text


def test_tools_and_structured_output(server):
    schema = {
        "title": "weather",
        "description": "the weather of a city",
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 10},
            "days": {"type": "integer", "maximum": 9, "minimum": 1},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    answer = (
        chat(server, max_tokens=120).bind_tools([schema], tool_choice="weather", parallel_tool_calls=False).invoke("?")
    )
    assert answer.tool_calls[0]["name"] == "weather"
    assert set(answer.tool_calls[0]["args"]) == {"city", "days"}
    for method in ("json_schema", "function_calling"):
        found = chat(server, max_tokens=120).with_structured_output(schema, method=method).invoke("the weather?")
        assert set(found) == {"city", "days"}, method
