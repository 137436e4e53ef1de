"""What a request to OpenAI's endpoints may ask for, and what is refused."""

from __future__ import annotations

import json

import pytest
from serving_helpers import NAME, messages, servers

from conftest import make_tokenizer
from kveraser.serving.decoding import TokenLogprob
from kveraser.serving.openai.replies import CompletionShape
from kveraser.serving.openai.token_bytes import TokenBytes


@pytest.fixture
def serve():
    with servers() as make:
        yield make


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "other"}, 404, "no model"),
        ({"messages": []}, 400, "messages"),
        ({"n": 2}, 400, "n:"),
        ({"tools": [{}]}, 400, "tools"),
        ({"temperature": 9}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 20_000}, 400, "context length"),
        ({"top_logprobs": 3}, 400, "logprobs"),
        ({"stop": [""]}, 400, "stop"),
        ({"kveraser": {"policy": "magic"}}, 400, "policy"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    ],
)
def test_bad_requests_are_refused_in_openais_format(serve, changes, status, words):
    body = {"model": NAME, "messages": messages(), "max_tokens": 2, **changes}
    headers = {"content-type": "application/json"}
    server = serve()
    for streamed in (False, True):
        text = json.dumps({**body, "stream": streamed})
        reply = server.call("POST", "/v1/chat/completions", content=text, headers=headers)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert words in reply.json()["error"]["message"]


def post(server, path="/v1/chat/completions", **changes):
    body = {"model": NAME, "max_tokens": 2, "temperature": 0, **changes}
    if "chat" in path:
        body = {"messages": messages(), **body}
    headers = {"content-type": "application/json"}
    return server.call("POST", path, content=json.dumps(body), headers=headers)


def refused(server, param, **changes):
    """What is said of a request that is refused for one field."""
    reply = post(server, **changes)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), reply.text
    assert not any(word in reply.text for word in ("list[", "TextPart", "constrained", "literal", "Value error"))
    return error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]), ("function_call", "auto"), ("tool_choice", "auto"), ("modalities", "audio"),
        ("top_k", 5), ("min_p", 0.1), ("guided_json", {}), ("temprature", 0.5), ("reasoning_effort", "low"),
        ("audio", {}), ("prediction", {}), ("store", True), ("web_search_options", {}), ("best_of", 1),
    ],
)  # fmt: skip
def test_a_field_that_is_not_served_is_refused_by_its_name_and_never_ignored(serve, name, value):
    server = serve()
    assert name in refused(server, name, **{name: value})
    assert post(server, "/v1/completions", prompt="the", **{name: value}).status_code == (
        200 if name == "best_of" else 400
    )


def test_fields_within_fields_are_refused_by_their_place(serve):
    server = serve()
    refused(server, "kveraser.polcy", kveraser={"polcy": "exact"})
    refused(server, "stream_options.usage", stream=True, stream_options={"usage": True})
    refused(
        server, "messages[1].contnet", messages=[{"role": "user", "content": "a"}, {"role": "user", "contnet": "x"}]
    )
    refused(server, "messages[0].content[1].type", messages=[{"role": "user", "content": [
        {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}])  # fmt: skip
    refused(server, "messages[0].content[0].text", messages=[{"role": "user", "content": [{"type": "text"}]}])
    refused(server, "stop[1]", stop=["a", ""])
    refused(server, "modalities[0]", modalities=["audio"])


def test_harmless_fields_are_accepted_and_so_is_null_for_whatever_is_not_given(serve):
    server = serve()
    plain = post(server).json()["choices"]
    notes = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
             "prompt_cache_key": "y", "parallel_tool_calls": True, "tool_choice": "none", "modalities": ["text"]}  # fmt: skip
    assert post(server, **notes).json()["choices"] == plain
    nulls = ("stream", "stream_options", "stop", "seed", "kveraser", "logprobs", "top_p", "n", "tools", "functions",
             "tool_choice", "logit_bias", "response_format", "user", "metadata", "modalities")  # fmt: skip
    assert post(server, **dict.fromkeys(nulls)).json()["choices"] == plain


@pytest.mark.parametrize("role", ["wizard", "function", "", "User", None, 5])
def test_a_role_that_is_not_there_is_refused(serve, role):
    server = serve()
    refused(server, "messages[0].role", messages=[{"role": role, "content": "x"}])
    name = server.call("POST", "/v1/sessions").json()["id"]
    body = {"role": role, "content": "x"}
    assert server.call("POST", f"/v1/sessions/{name}/messages", json=body).json()["error"]["param"] == "role"


def test_a_developers_message_is_a_systems(serve):
    server = serve()
    said = [("system", "you are kind"), ("user", "the code?")]
    newer = [("developer", "you are kind"), ("user", "the code?")]
    assert server.chat(said).json()["choices"] == (reply := server.chat(newer).json())["choices"]
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == reply["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": ""},
                                     {"role": "user", "content": []}, {"role": "tool"}, {"role": "system"}])  # fmt: skip
def test_a_message_needs_content(serve, message):
    assert "content" in refused(serve(), "messages[0]", messages=[message])


def test_an_assistants_message_may_call_tools_instead_and_comes_back_as_clients_keep_it(serve):
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    kept = {"role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
            "function_call": None, "tool_calls": [call]}  # fmt: skip
    talk = [{"role": "user", "content": "x"}, kept, {"role": "tool", "content": "", "tool_call_id": "a"}]
    assert post(serve(), messages=talk).status_code == 200


def test_what_is_nested_too_deeply_is_refused(serve):
    server = serve()
    for depth in (100, 900, 5000, 100_000):
        deep = "[" * depth + "]" * depth
        for field in (f'"tool_calls": {deep}', f'"content": {deep}', f'"x": {deep}'):
            text = f'{{"model": "{NAME}", "messages": [{{"role": "user", {field}}}]}}'
            reply = server.call(
                "POST", "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
            )
            assert reply.status_code == 400, (depth, field)


def test_a_prompt_may_stand_in_a_list_of_one(serve):
    server, ids = serve(), make_tokenizer().encode("the code of")
    answers = [post(server, "/v1/completions", prompt=prompt).json()["choices"]
               for prompt in ("the code of", ["the code of"], ids, [ids])]  # fmt: skip
    assert answers == [answers[0]] * 4
    for prompt in (["one", "two"], [], [[]], [ids, ids], [5, "five"]):
        assert post(server, "/v1/completions", prompt=prompt).status_code == 400, prompt


def test_too_many_tokens_have_openais_code_and_the_field_that_they_come_from(serve):
    server = serve(cache_budget=1 << 30)
    for reply, param in ((post(server, max_tokens=20_000), "messages"),
                         (post(server, "/v1/completions", prompt="the", max_tokens=20_000), "prompt")):  # fmt: skip
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


def test_logprobs_have_the_true_bytes_also_of_a_part_of_a_character():
    tokenizer = make_tokenizer()
    text = "çödé 🎈 the code"
    known = TokenBytes(tokenizer)
    assert b"".join(known.of(token) for token in tokenizer.encode(text, add_special_tokens=False)) == text.encode()


@pytest.mark.parametrize("words", [("the", " code", " of"), ("the",), ()])
def test_a_token_of_a_text_completion_begins_where_the_texts_before_it_end(words):
    tokenizer = make_tokenizer()
    ids = [token for word in words for token in tokenizer.encode(word, add_special_tokens=False)]
    told = CompletionShape(tokenizer, NAME).logprobs(tuple(TokenLogprob(token, -1.0, ()) for token in ids), 5)
    assert told["text_offset"] == [5 + len("".join(told["tokens"][:index])) for index in range(len(ids))]
