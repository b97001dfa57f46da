"""The API over a real server: what is answered, and that it is what the engine says offline."""

import json
import re
import socket
import time
from pathlib import Path

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerProcess

from evenflow import LLM, SamplingParams
from evenflow.server.protocol import ChatCompletionRequest, CompletionRequest, absent_fields
from evenflow.server.responses import ResponsesRequest

TALE = "tell me the tale of the wolf and the lamb"
ONCE = "Once upon a time"


@pytest.fixture(scope="module")
def server():
    with ServerProcess() as process:
        yield process
        process.wait_idle()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def llm():
    return LLM("demo")


def post(server, path, body, status=200):
    response = server.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def events(server, path, body):
    """The data of a stream's events, without [DONE], which must come last."""
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Completions


def test_the_four_forms_of_a_prompt(server, llm):
    ids = llm.tokenizer.encode(ONCE)
    expected = llm.generate([ONCE], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    for prompt, count in ((ONCE, 1), ([ONCE, ONCE], 2), (ids, 1), ([ids, ids, ids], 3)):
        answer = post(server, "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8})
        assert [choice["text"] for choice in answer["choices"]] == [expected] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert answer["usage"]["prompt_tokens"] == count * len(ids)
        assert answer["usage"]["completion_tokens"] == count * 8
        assert answer["object"] == "text_completion"
        assert answer["model"] == "demo"


def test_echo_scores_a_prompt_as_evaluation_harnesses_read_it(server, llm):
    prompts = [llm.tokenizer.encode(text) for text in (ONCE, "The fox and the grapes")]
    expected = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    )
    for max_tokens in (0, 1):
        body = {"prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1}
        answer = post(server, "/v1/completions", body)
        assert answer["usage"]["completion_tokens"] == 2 * max_tokens
        for ids, choice, output in zip(prompts, answer["choices"], expected, strict=True):
            logprobs = choice["logprobs"]
            assert len(logprobs["tokens"]) == len(ids) + max_tokens
            assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"])
            assert logprobs["token_logprobs"][0] is None
            assert logprobs["top_logprobs"][0] is None
            for i in range(1, len(ids)):
                entry = output.prompt_logprobs[i]
                # The served batch differs, and with it the order of sums.
                assert logprobs["token_logprobs"][i] == pytest.approx(entry[ids[i]].logprob, abs=1e-4)
                best = logprobs["top_logprobs"][i]
                assert best[logprobs["tokens"][i]] == logprobs["token_logprobs"][i]
                is_greedy = max(best.values()) == logprobs["token_logprobs"][i]
                assert is_greedy == (entry[ids[i]].rank == 1)


def test_echo_returns_the_prompt(server):
    answer = post(server, "/v1/completions", {"prompt": ONCE, "echo": True, "max_tokens": 3, "temperature": 0})
    assert answer["choices"][0]["text"].startswith(ONCE + " ")
    nothing = post(server, "/v1/completions", {"prompt": ONCE, "echo": True, "max_tokens": 0})
    assert nothing["choices"][0]["text"] == ONCE
    assert nothing["choices"][0]["finish_reason"] == "length"


def test_numbers_in_other_forms_are_what_they_say(server):
    body = {"prompt": ONCE, "max_tokens": 4, "logprobs": 1, "temperature": 0}
    expected = post(server, "/v1/completions", body)["choices"]
    assert post(server, "/v1/completions", body | {"max_tokens": 4.0, "logprobs": True})["choices"] == expected


def test_text_offsets_point_into_the_text(server):
    answer = post(server, "/v1/completions", {"prompt": ONCE, "echo": True, "max_tokens": 8, "logprobs": 0, "seed": 2})
    choice = answer["choices"][0]
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert token == "<|begin|>" or choice["text"].startswith(token, offset)


def test_best_of_returns_the_likeliest(server):
    body = {"prompt": ONCE, "max_tokens": 6, "seed": 5, "temperature": 1.5, "logprobs": 0}
    every = post(server, "/v1/completions", body | {"n": 6})["choices"]
    means = sorted((sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in every), reverse=True)
    best = post(server, "/v1/completions", body | {"n": 2, "best_of": 6})
    found = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in best["choices"]]
    assert found == pytest.approx(means[:2], abs=1e-4)
    assert len(set(means)) > 2
    assert best["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)


STREAMED = [
    {"prompt": ONCE, "max_tokens": 24, "seed": 3},
    {"prompt": [ONCE, "The end"], "max_tokens": 10, "n": 2, "seed": 3, "logprobs": 2},
    {"prompt": ONCE, "max_tokens": 40, "seed": 3, "n": 3, "stop": [" the", "\n"], "temperature": 1.2},
    {"prompt": ONCE, "max_tokens": 10, "seed": 3, "n": 2, "echo": True, "logprobs": 1},
    {"prompt": ONCE, "max_tokens": 0, "echo": True, "logprobs": 1},
    {"prompt": ONCE, "max_tokens": 30, "seed": 4, "guided_regex": "[a-z ]{5,20}\\."},
    {"prompt": "é ü 漢字 🙂", "max_tokens": 20, "seed": 5, "temperature": 2.0},
]


@pytest.mark.parametrize("body", STREAMED)
def test_a_streamed_completion_is_the_whole_one(server, body):
    whole = post(server, "/v1/completions", body)
    parts = events(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    usage = parts.pop()
    assert usage["choices"] == []
    assert {k: v for k, v in usage["usage"].items() if "details" not in k} == {
        k: v for k, v in whole["usage"].items() if "details" not in k
    }
    assert all(part["usage"] is None for part in parts)
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert all(part["finish_reason"] is None for part in mine[:-1])
        if choice["logprobs"] is not None:
            for name in ("tokens", "text_offset"):
                assert [x for part in mine for x in part["logprobs"][name]] == choice["logprobs"][name]


def test_usage_comes_with_every_chunk_on_demand(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = events(server, "/v1/completions", {"prompt": ONCE, "max_tokens": 5, "stream_options": options})
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_cached_tokens_are_told(server):
    prompt = ONCE + ", in a land that no other test speaks of, there lived a cat with seven coats and nine cousins"
    first = post(server, "/v1/completions", {"prompt": prompt, "max_tokens": 1})["usage"]
    again = post(server, "/v1/completions", {"prompt": prompt, "max_tokens": 1})["usage"]
    salted = post(server, "/v1/completions", {"prompt": prompt, "max_tokens": 1, "cache_salt": "mine"})["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] == (again["prompt_tokens"] - 1) // 16 * 16 > 0
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_every_field_may_be_null_and_unknown_ones_are_ignored(server):
    nulls = dict.fromkeys(CompletionRequest.__struct_fields__) | {"prompt": "a", "max_tokens": 1}
    post(server, "/v1/completions", nulls | {"unheard_of": {"of": [1]}})
    nulls = dict.fromkeys(ChatCompletionRequest.__struct_fields__) | {"messages": [{"role": "user", "content": "a"}]}
    post(server, "/v1/chat/completions", nulls | {"max_tokens": 1, "store": True})


ABSENT = [
    ("/v1/completions", "allowed_token_ids", [1]),
    ("/v1/completions", "logits_processors", ["x"]),
    ("/v1/completions", "prompt_embeds", "AAAA"),
    ("/v1/completions", "return_token_ids", True),
    ("/v1/completions", "return_tokens_as_token_ids", True),
    ("/v1/completions", "truncate_prompt_tokens", 3),
    ("/v1/completions", "use_beam_search", True),
    ("/v1/chat/completions", "add_special_tokens", True),
    ("/v1/chat/completions", "allowed_token_ids", [1]),
    ("/v1/chat/completions", "audio", {"voice": "x"}),
    ("/v1/chat/completions", "best_of", 2),
    ("/v1/chat/completions", "chat_template", "{{ messages }}"),
    ("/v1/chat/completions", "documents", [{"text": "a"}]),
    ("/v1/chat/completions", "echo", True),
    ("/v1/chat/completions", "function_call", {"name": "f"}),
    ("/v1/chat/completions", "functions", [{"name": "f"}]),
    ("/v1/chat/completions", "modalities", ["text", "audio"]),
    ("/v1/chat/completions", "prompt_logprobs", 0),
    ("/v1/chat/completions", "truncate_prompt_tokens", -1),
    ("/v1/chat/completions", "web_search_options", {}),
    ("/v1/responses", "echo", True),
    ("/v1/responses", "functions", [{"name": "f"}]),
    ("/v1/responses", "logprobs", True),
    ("/v1/responses", "max_tokens", 5),
    ("/v1/responses", "messages", [{"role": "user", "content": "a"}]),
    ("/v1/responses", "n", 2),
    ("/v1/responses", "prompt", {"id": "pmpt_1"}),
    ("/v1/responses", "response_format", {"type": "json_object"}),
]
QUESTIONS = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
}


@pytest.mark.parametrize(("path", "name", "value"), ABSENT)
def test_a_known_field_that_is_absent_is_refused_not_ignored(server, path, name, value):
    error = post(server, path, QUESTIONS[path] | {name: value}, 400)["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is not implemented; ")


@pytest.mark.parametrize("path", QUESTIONS)
def test_absent_fields_that_ask_for_nothing_pass(server, path):
    names = {name for where, name, _ in ABSENT if where == path}
    neutral = {"n": 1, "best_of": 1, "function_call": "auto", "modalities": ["text"], "functions": []}
    post(server, path, QUESTIONS[path] | dict.fromkeys(names, False))
    post(server, path, QUESTIONS[path] | {name: neutral.get(name) for name in names})


def test_every_absent_field_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for kind in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        assert [name for name in absent_fields(kind) if f"`{name}`" not in text] == []


def test_parameters_reach_the_sampler(server):
    def text(**body):
        return post(server, "/v1/completions", {"prompt": ONCE, "max_tokens": 12, "seed": 1} | body)["choices"][0][
            "text"
        ]

    greedy = text(temperature=0)
    assert text(temperature=1.5, top_k=1) == greedy
    assert text(temperature=0, logit_bias={"263": 100}) != greedy
    assert text(temperature=0, repetition_penalty=5.0) != greedy
    assert text(temperature=0, bad_words=[greedy.split()[0]]).split()[0] != greedy.split()[0]
    assert text(temperature=0, stop=[greedy[5:8]]) == greedy[: greedy.index(greedy[5:8])]
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1) != text(temperature=1.5, seed=2)
    assert len(text(temperature=0, min_tokens=12, ignore_eos=True)) >= len(greedy)


# Chat


CHATS = [
    {"max_tokens": 20, "temperature": 0},
    {"max_completion_tokens": 12, "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 3},
    {"max_tokens": 30, "stop": ["Lamb"], "temperature": 0},
    {"max_tokens": 60, "response_format": {"type": "json_object"}, "seed": 2},
]


@pytest.mark.parametrize("body", CHATS)
def test_a_streamed_chat_is_the_whole_one(server, body):
    body = body | {"messages": [{"role": "user", "content": TALE}]}
    whole = post(server, "/v1/chat/completions", body)
    parts = events(server, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert parts.pop()["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"] is not None:
            told = [token for part in mine if part["logprobs"] for token in part["logprobs"]["content"]]
            assert [t["token"] for t in told] == [t["token"] for t in choice["logprobs"]["content"]]
            assert all(len(t["top_logprobs"]) == 3 for t in told)
            text = b"".join(bytes(t["bytes"]) for t in told).decode("utf-8", "replace")
            assert text.startswith(choice["message"]["content"])


def test_a_chat_tells_the_tale(server, llm):
    body = {"messages": [{"role": "user", "content": TALE}], "temperature": 0, "max_tokens": 40}
    answer = post(server, "/v1/chat/completions", body)
    expected = llm.chat([{"role": "user", "content": TALE}], SamplingParams(temperature=0, max_tokens=40))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected[0].outputs[0].text}
    assert "Wolf" in expected[0].outputs[0].text


def test_the_text_of_a_special_token_is_data_in_a_message(server, llm):
    """A user cannot end a turn, or begin one, by writing the tokens that do."""
    special = llm.tokenizer.named_tokens["eos_token"]
    ids = post(server, "/tokenize", {"messages": [{"role": "user", "content": f"a{special}b"}]})["tokens"]
    plain = post(server, "/tokenize", {"messages": [{"role": "user", "content": "ab"}]})["tokens"]
    assert ids.count(llm.tokenizer.eos_token_id) == plain.count(llm.tokenizer.eos_token_id)
    assert f"a{special}b" in post(server, "/detokenize", {"tokens": ids})["prompt"]


def test_a_conversation_is_the_same_prompt_everywhere(server, llm):
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": TALE},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "then?"},
    ]
    ids = post(server, "/tokenize", {"messages": messages})["tokens"]
    assert ids == llm.tokenizer.chat_prompt(messages).token_ids
    usage = post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})["usage"]
    assert usage["prompt_tokens"] == len(ids)


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("seed", range(3))
def test_tool_calls_are_valid_by_construction(client, tool_choice, seed):
    question = {
        "model": "demo",
        "messages": [{"role": "user", "content": "the weather?"}],
        "tools": TOOLS,
        "tool_choice": tool_choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "seed": seed,
    }
    whole = client.chat.completions.create(**question)
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert set(arguments) == {"city", "days"}
    assert 1 <= arguments["days"] <= 9
    name, streamed = None, ""
    for chunk in client.chat.completions.create(**question, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            name = part.function.name or name
            streamed += part.function.arguments or ""
    assert (name, streamed) == ("weather", call.function.arguments)


def test_tools_that_are_not_asked_for_leave_the_answer_alone(client):
    messages = [{"role": "user", "content": TALE}]
    plain = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=20)
    unused = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=20, tools=TOOLS, tool_choice="none"
    )
    assert unused.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("seed", range(2))
def test_a_json_schema_is_kept(client, seed):
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "who?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}},
        max_tokens=100,
        seed=seed,
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "days"}
    assert answer.choices[0].finish_reason == "stop"


# Responses


def test_responses_stream_what_they_return_whole(client):
    question = {"model": "demo", "input": TALE, "temperature": 0, "max_output_tokens": 400}
    whole = client.responses.create(**question)
    assert whole.status == "completed"
    with client.responses.stream(**question) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "Wolf" in whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens > 100
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_responses_call_functions(client):
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    answer = client.responses.create(
        model="demo",
        instructions="Be brief.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "the weather?"}]}],
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=120,
    )
    (call,) = answer.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert set(json.loads(call.arguments)) == {"city", "days"}


def test_responses_are_incomplete_when_cut(client):
    answer = client.responses.create(model="demo", input=TALE, max_output_tokens=3, top_logprobs=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert len(answer.output[0].content[0].logprobs) == 3


@pytest.mark.parametrize(
    "field",
    [
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_choice": ["yes", "no"]},
        {"guided_regex": "yes|no"},
        {"guided_grammar": 'start: "yes" | "no"'},
    ],
)
def test_responses_take_structured_outputs_as_chats_do(server, field):
    answer = post(server, "/v1/responses", {"input": TALE, "max_output_tokens": 20} | field)
    assert answer["output"][0]["content"][0]["text"] in ("yes", "no")


def test_responses_take_the_other_extra_fields_of_a_chat(server):
    def text(**body):
        answer = post(server, "/v1/responses", {"input": TALE, "max_output_tokens": 12, "temperature": 0} | body)
        return answer["output"][0]["content"][0]["text"]

    greedy = text()
    assert text(logit_bias={"263": 100}) != greedy
    assert text(frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=50.0) != greedy
    body = {"input": TALE, "text": {"format": {"type": "json_object"}}, "guided_regex": "a"}
    error = post(server, "/v1/responses", body, 400)["error"]
    assert (error["param"], error["message"][:11]) == ("text", "text.format")


def test_responses_name_the_item_and_its_field_at_fault(server):
    user = {"role": "user", "content": "a"}
    items = [user, {"type": "function_call_output", "call_id": "c", "output": 5}]
    error = post(server, "/v1/responses", {"input": items, "instructions": "b"}, 400)["error"]
    assert error["message"] == "input[1].output must be a string or a list of text parts, not int"
    items = [user, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]
    error = post(server, "/v1/responses", {"input": items}, 400)["error"]
    assert error["message"] == "input[1].arguments is not valid JSON"
    error = post(server, "/v1/responses", {"input": "a", "max_output_tokens": 2, "min_tokens": 3}, 400)["error"]
    assert error["message"] == "min_tokens=3 must be at most max_output_tokens=2"


# The rest of the surface


def test_models(server):
    (model,) = server.client.get("/v1/models").json()["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == ("demo", "demo", 1024)
    assert server.client.get("/v1/models/demo").json() == model
    assert server.client.get("/v1/models/other").status_code == 404


def test_tokenize_and_back(server, llm):
    for text in ("Once", "é 漢字 🙂\n", ""):
        answer = post(server, "/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})
        assert answer["tokens"] == llm.tokenizer.encode(text, add_special_tokens=False)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert post(server, "/detokenize", {"tokens": answer["tokens"]})["prompt"] == text
    info = server.client.get("/tokenizer_info").json()
    assert info["bos_token"] == "<|begin|>"
    assert info["eos_token"] == llm.tokenizer.named_tokens["eos_token"]
    assert "messages" in info["chat_template"]


def test_health_ready_version_metrics(server):
    assert server.client.get("/health").json() == {"status": "alive"}
    assert server.client.get("/ready").json() == {"status": "ready"}
    assert set(server.client.get("/version").json()) == {"version"}
    before = sample(server, "evenflow_generation_tokens_total")
    post(server, "/v1/completions", {"prompt": ONCE, "max_tokens": 7, "ignore_eos": True})
    assert sample(server, "evenflow_generation_tokens_total") == before + 7
    assert sample(server, "evenflow_engine_up") == 1


def sample(server, name):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == name)


def test_the_page_and_its_policy(server):
    page = server.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert server.client.get("/web/../app.py").status_code == 404
    assert server.client.get("/web/%2e%2e/app.py").status_code == 404
    assert server.client.get("/web/nothing.js").status_code == 404


# Refusals


HI = [{"role": "user", "content": "a"}]
BAD = [
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": "", "add_special_tokens": False}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": ["a", 1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [99999999]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [2**70]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a " * 5000}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "temperature": -0.1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "top_p": 1.01}, 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "top_k": -2}, 400, "top_k"),
    ("/v1/completions", {"prompt": "a", "min_p": 2}, 400, "min_p"),
    ("/v1/completions", {"prompt": "a", "repetition_penalty": 1e-38}, 400, "repetition_penalty"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n"),
    ("/v1/completions", {"prompt": "a", "n": 129}, 400, "n"),
    ("/v1/completions", {"prompt": ["a"] * 100, "n": 3}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [-1]}, 400, "stop_token_ids"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    ("/v1/completions", {"prompt": "a", "seed": 2**65}, 400, "seed"),
    ("/v1/completions", {"prompt": "a", "suffix": "z"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 1}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "["}, 400, "guided_regex"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "(a{1000}){1000}"}, 400, "guided_regex"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_regex"),
    ("/v1/completions", {"prompt": "a", "guided_json": {"type": "strong"}}, 400, "guided_json"),
    ("/v1/completions", {"prompt": "a", "guided_json": "{"}, 400, "guided_json"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"grammar": "nonsense"}}, 400, "structured_outputs"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 2001}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": HI, "top_logprobs": 5}, 400, "top_logprobs"),
    (
        "/v1/chat/completions",
        {"messages": HI, "tool_choice": "required"},
        400,
        "tool_choice",
    ),
    ("/v1/chat/completions", {"messages": HI, "tools": [{"type": "x"}]}, 400, "tools"),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", {"messages": HI, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ("/v1/chat/completions", {"messages": HI, "chat_template_kwargs": {"messages": 1}}, 400, "chat_template_kwargs"),
    (
        "/v1/chat/completions",
        {"messages": HI, "chat_template_kwargs": {"add_generation_prompt": True}},
        400,
        "chat_template_kwargs",
    ),
    ("/tokenize", {"messages": HI, "chat_template_kwargs": {"self": 1}}, 400, "chat_template_kwargs"),
    ("/tokenize", {"messages": HI, "chat_template_kwargs": {"tools": None}}, 400, "chat_template_kwargs"),
    ("/tokenize", {"messages": HI, "tools": [{"a": 1}]}, 400, "tools"),
    (
        "/v1/chat/completions",
        {"messages": HI, "response_format": {"type": "json_schema"}},
        400,
        "response_format",
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        400,
        "response_format",
    ),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ("/v1/responses", {"input": [{"type": "item_reference"}]}, 400, "input"),
    ("/v1/responses", {"input": []}, 400, "input"),
    ("/v1/responses", {"input": [{"role": "user"}]}, 400, "input"),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, 400, "input"),
    ("/v1/responses", {"input": [{"type": "function_call", "name": 5, "arguments": "{}"}]}, 400, "input"),
    ("/v1/responses", {"input": "a " * 5000}, 400, "input"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "so " * 9000}]}, 400, "messages"),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ("/detokenize", {"tokens": [99999999]}, 400, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_input_is_refused_by_name(server, path, body, status, param):
    error = post(server, path, body, status)["error"]
    assert error["param"] == param, error
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    if path == "/v1/responses":
        assert not re.search("messages|max_tokens|response_format", error["message"])
    if body.get("stream") is None and path != "/tokenize" and path != "/detokenize":
        # The same refusal, not half of an answer, when a stream is asked for.
        assert server.client.post(path, json=body | {"stream": True}).status_code == status


def test_a_schema_that_cannot_be_compiled_is_named(server):
    """Of several tools the one; one that need not be strict loses the keyword instead."""
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?!x)y"}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "odd", "parameters": odd, "strict": True}}]
    body = {"messages": HI, "tools": tools, "max_tokens": 2}
    message = post(server, "/v1/chat/completions", body, 400)["error"]["message"]
    assert message.startswith("tools[1].function.parameters: ")
    assert "look-ahead" in message
    assert "(?!x)y" in message
    tools[1]["function"]["strict"] = False
    post(server, "/v1/chat/completions", body)
    tools[1]["function"]["parameters"] = {"type": "object", "properties": {"a": {"type": "strong"}}}
    message = post(server, "/v1/chat/completions", body, 400)["error"]["message"]
    assert message.startswith("tools[1].function.parameters: ")


RAW = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": "a", "temperature": 1e999}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "a", "guided_json": ' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}", 400),
    (b"[" * 100_000, 400),
]


@pytest.mark.parametrize(("body", "status"), RAW)
def test_bodies_that_are_no_json_of_ours(server, body, status):
    response = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["prompt", "messages", "input", "n", "temperature", "logit_bias", "stop", "logprobs", "tools", "tool_choice"]
FIELDS += ["response_format", "stream_options", "max_tokens", "top_logprobs", "guided_json", "echo", "seed", "best_of"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
)
def test_nothing_that_a_client_can_send_is_our_failure(server, path, body):
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    content = json.dumps({limit: 2} | body).encode("utf-8", "surrogatepass")
    response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# A client that leaves


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_client_that_leaves_takes_its_request_along(server, is_streaming):
    before = server.wait_idle()["num_requests"]["aborted"]
    body = {"prompt": ONCE, "max_tokens": 1000, "ignore_eos": True, "stream": is_streaming, "n": 4}
    data = json.dumps(body).encode()
    with socket.create_connection((server.host, server.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        while server.live()["num_running"] < 4:
            pass
    after = server.wait_idle()
    assert after["num_requests"]["aborted"] == before + 1


def test_metrics_alone_tell_that_nothing_runs(server):
    """After ends that no step tells: a stop string, and a client that leaves. Only /metrics is read: it asks nobody."""
    gauges = ("evenflow_num_requests_running", "evenflow_kv_cache_usage_perc")

    def wait(is_running):
        deadline = time.monotonic() + 30
        while any((sample(server, name) > 0) != is_running for name in gauges):
            assert time.monotonic() < deadline

    answer = post(server, "/v1/completions", {"prompt": ONCE, "temperature": 0, "max_tokens": 500, "stop": " "})
    assert answer["choices"][0]["finish_reason"] == "stop"
    wait(False)
    body = {"prompt": ONCE, "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 4}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: with it the connection would be closed
        next(lines)
        wait(True)
    wait(False)
