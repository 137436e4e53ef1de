"""What a reply holds, read from its text however it is cut."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kveraser.errors import BadCallError, SchemaError
from kveraser.serving.chat.dialects.hermes import Hermes
from kveraser.serving.chat.reading import CallPiece, PlainReader, ReplyReader, TextPiece, ThinkingPiece, joined
from kveraser.serving.chat.tools import Tool, ToolChoice, Toolset

LOOK = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
THINK = ("<think>", "</think>")


def toolset(parallel=True, **choice):
    tools = [Tool("look", LOOK, {}), Tool("free", {}, {})]
    return Toolset.of(tools, ToolChoice(parallel=parallel, **choice))


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def piece(name, **arguments):
    return CallPiece(name, json.dumps(arguments))


def read(parts, thinking=None, inside=False, **options):
    reader = ReplyReader(Hermes(), toolset(**options), thinking, inside)
    pieces = [found for part in parts for found in reader.push(part)]
    return joined([*pieces, *reader.finish()]), list(reader.problems)


OSLO = call("look", city="Oslo")
REPLIES = [
    ("just text ", [TextPiece("just text ")]),
    ("", []),
    ("  \n", [TextPiece("  \n")]),
    (OSLO, [piece("look", city="Oslo")]),
    (f"I look.\n{OSLO}\n", [TextPiece("I look."), piece("look", city="Oslo")]),
    (f"{OSLO}\n{call('free')}", [piece("look", city="Oslo"), piece("free")]),
    (
        f"{OSLO}\n so \n{call('free', a=[1, {'b': None}])}",
        [piece("look", city="Oslo"), TextPiece("so"), piece("free", a=[1, {"b": None}])],
    ),
    (call("free", a='</tool_call> "<tool_call>'), [piece("free", a='</tool_call> "<tool_call>')]),
    ('<tool_call>{"name": "free"}</tool_call>', [piece("free")]),
    ('<tool_call>{"name": "free", "arguments": {}}', [piece("free")]),  # the reply ended where the tag was to be
    ('<tool_call>{"name": "free"}\n</tool_response>', [piece("free"), TextPiece("</tool_response>")]),  # another tag
    ('<tool_call>{"name": "free"} so </tool_call>', [piece("free"), TextPiece("so </tool_call>")]),
    (' {"name": "free", "arguments": {"a": "}"}}\n', [piece("free", a="}")]),  # no tags at all
    ('{ "name": "free"}</tool_call>{"name": "free"} so', [piece("free"), piece("free"), TextPiece("so")]),
    ('{"name": "Bob", "arguments": {}} ', [TextPiece('{"name": "Bob", "arguments": {}} ')]),
    ('{"name": "free"', [TextPiece('{"name": "free"')]),
    ('{"name": "Bob", "age": 5}', [TextPiece('{"name": "Bob", "age": 5}')]),
    (' {"other": 1}', [TextPiece(' {"other": 1}')]),
    ('so {"name": "free"}', [TextPiece('so {"name": "free"}')]),
    ("a < b, <tool, <tool_cal", [TextPiece("a < b, <tool, <tool_cal")]),
]


@pytest.mark.parametrize(("text", "expected"), REPLIES)
def test_text_and_calls_are_told_apart(text, expected):
    assert read([text]) == (expected, [])


MALFORMED = [
    ("<tool_call>not json</tool_call>", "no JSON"),
    ('<tool_call>{"name": "free", "arguments": {"a": NaN}}</tool_call>', "no JSON"),
    ('<tool_call>{"name": "free", "arguments": {"a": 1e999}}</tool_call>', "JSON can carry"),
    ('<tool_call>{"name": "free", "arguments": {"a": "\\ud800"}}</tool_call>', "JSON can carry"),
    ('<tool_call>{"name": "free", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}</tool_call>", "no JSON"),
    ('<tool_call>["free"]</tool_call>', "names no tool"),
    ('<tool_call>{"name": "free", "arguments": "{}"}</tool_call>', "no JSON object"),
    ('<tool_call>{"name": "free", "more": 1}</tool_call>', "more"),
    (call("fly"), "no tool of that name"),
    (call("look", city=5), "do not fit the tool's schema"),
    (call("look"), "city"),
    ('{"name": "look", "arguments": {"city": 5}}', "do not fit the tool's schema"),
    ('<tool_call>{"name": "free", "argu', "has no end"),
]


@pytest.mark.parametrize(("text", "reason"), MALFORMED)
def test_what_only_looks_like_a_call_is_text_as_it_stands_and_a_problem(text, reason):
    pieces, problems = read([f"{text} "])
    assert pieces == [TextPiece(f"{text} ")]
    assert len(problems) == 1
    assert reason in problems[0]


def test_a_call_behind_one_without_an_end_is_still_found():
    pieces, problems = read([f'<tool_call>{{"name": "free", "arguments": {{"a": "\n{OSLO}'])
    assert pieces == [TextPiece('<tool_call>{"name": "free", "arguments": {"a": "'), piece("look", city="Oslo")]
    assert len(problems) == 1


def test_what_is_thought_comes_first_and_without_its_tags():
    text = f"\n<think>\n a plan \n</think>\n\nI look.\n{OSLO}"
    expected = [ThinkingPiece("a plan"), TextPiece("I look."), piece("look", city="Oslo")]
    assert read([text], THINK) == (expected, [])
    assert read([text.removeprefix("\n<think>")], THINK, True) == (expected, [])
    assert read(["<think>\n\n</think>\n\nyes"], THINK) == ([TextPiece("yes")], [])
    assert read(["<think> on and on"], THINK) == ([ThinkingPiece("on and on")], [])
    assert read(["<thin"], THINK) == ([TextPiece("<thin")], [])
    assert read([" yes <think>no</think>"], THINK) == ([TextPiece(" yes <think>no</think>")], [])


def test_without_parallel_calls_a_reply_ends_with_its_first_call():
    assert read([f"I look.\n{OSLO}\nand {call('free')}"], parallel=False) == (
        [TextPiece("I look."), piece("look", city="Oslo")], [])  # fmt: skip
    reader = ReplyReader(Hermes(), toolset(parallel=False))
    reader.push("<tool_call>{}</tool_call>")
    assert not reader.done
    reader.push(OSLO)
    assert reader.done


def test_another_tool_than_the_one_that_was_named_is_not_called():
    assert read([call("free")], mode="required", name="look") == (
        [TextPiece(call("free"))], ["the tool to call is 'look'"])  # fmt: skip


FRAGMENTS = [
    '{"na',
    'me": "free"}',"<tool_call>", "</tool_call>", "<think>", "</think>", "\n", " ", '"', "\\", "word", "é🎈", "<", "{", "}",
             '{"name": "free", "arguments": {}}', '{"name": "look", "arguments": {"city": "x"}}', OSLO, call("free", a="\\\"</tool_call>")]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def cut(text, places):
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(TEXTS, st.lists(st.integers(0, 400), max_size=20), st.booleans(), st.sampled_from([(None, False), (THINK, False), (THINK, True)]))  # fmt: skip
def test_however_a_reply_is_cut_the_same_is_read(text, places, parallel, thinking):
    whole = read([text], *thinking, parallel=parallel)
    assert read(cut(text, places), *thinking, parallel=parallel) == whole
    assert read(list(text), *thinking, parallel=parallel) == whole


@given(TEXTS)
def test_nothing_is_lost_and_nothing_is_told_twice(text):
    pieces, _ = read([text])
    told = "".join(each.text for each in pieces if isinstance(each, TextPiece))
    rest = iter(text)
    assert all(letter in rest for letter in told)  # in this order
    if not any(isinstance(each, CallPiece) for each in pieces):
        assert told == text


@given(st.lists(st.tuples(st.sampled_from(["look", "free"]), st.text(), st.text()), max_size=4))
def test_whatever_calls_are_written_are_read(calls):
    written, expected = "", []
    for name, city, key in calls:
        arguments = {"city": city, f"x{key}": [key]}
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            continue
        written += (
            f"\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        )
        expected.append(CallPiece(name, json.dumps(arguments, ensure_ascii=False)))
    assert read([written]) == (expected, [])


def test_a_plain_reply_is_told_as_it_comes():
    reader = PlainReader()
    assert [*reader.push("<tool_call> "), *reader.push(""), *reader.finish()] == [TextPiece("<tool_call> ")]


@pytest.mark.parametrize("schema", [{"type": 5}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"},
                                    {"pattern": "("}, {"$schema": "http://nowhere/x"}])  # fmt: skip
def test_a_schema_that_is_none_or_somewhere_else_is_refused(schema):
    with pytest.raises(SchemaError) as found:
        Toolset.of([Tool("free", {}, {}), Tool("bad", schema, {})], ToolChoice())
    assert found.value.index == 1


def test_a_choice_that_no_tool_can_meet_is_refused():
    with pytest.raises(BadCallError, match="fly"):
        toolset(mode="required", name="fly")
    with pytest.raises(BadCallError):
        Toolset.of([], ToolChoice("required"))


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"pattern": "^(a+)+$"}])
def test_a_schema_that_could_keep_a_validator_busy_for_ever_does_not(schema):
    tools = Toolset.of([Tool("bad", {"additionalProperties": schema}, {})], ToolChoice())
    with suppress(BadCallError):
        tools.check("bad", {"x": "a" * 60 + "b"})


def twice(levels, leaf=None, key="$ref", name="#/$defs/a{}"):
    """A schema in which every reference occurs twice in the one before it."""
    steps = {f"a{n}": {"allOf": [{key: name.format(n + 1)}] * 2} for n in range(levels)}
    return {key: name.format(0), "$defs": {**steps, f"a{levels}": leaf or {"type": "object"}}}


def named(schema, key):
    """The same, with every definition named by a keyword."""
    return {**schema, "$defs": {name: {key: name, **each} for name, each in schema["$defs"].items()}}


def clique(size):
    refs = [{"$ref": f"#/$defs/a{n}"} for n in range(size)]
    return {**refs[0], "$defs": {f"a{n}": {"anyOf": refs[:n] + refs[n + 1 :]} for n in range(size)}}


BOMBS = {
    "pointers": twice(30),
    "percent": twice(30, name="#/%24defs/a{}"),
    "properties": {"properties": {"x": twice(30)["$defs"]["a0"]}, "$defs": twice(30)["$defs"]},
    "anchors": named(twice(30, name="#a{}"), "$anchor"),
    "dynamic": named(twice(30, key="$dynamicRef", name="#a{}"), "$dynamicAnchor"),
    "ids": named(twice(30, name="a{}"), "$id"),
    "absolute": {"$id": "http://x/y", **twice(30, name="http://x/y#/$defs/a{}")},
    "each within another": clique(30),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_schema_whose_references_multiply_is_refused(kind):
    with pytest.raises(SchemaError, match="100000") as found:
        Toolset.of([Tool("free", {}, {}), Tool("bad", BOMBS[kind], {})], ToolChoice())
    assert found.value.index == 1


@pytest.mark.parametrize(
    "schema",
    [
        twice(10),
        named(twice(6, name="a{}"), "$id"),
        {"properties": {"x": {"$ref": "#"}}, "type": "object"},
        {"$defs": {"a/b%": {"type": "object"}}, "$ref": "#/$defs/a~1b%25"},
        {"definitions": {"a": {"$id": "#here", "type": "object"}}, "$ref": "#here",
         "$schema": "http://json-schema.org/draft-07/schema#"},
        {"properties": {"$ref": {"type": "string"}, "x": {"const": {"$ref": "#/nowhere"}}}, "type": "object"},
        {"$ref": "#/$defs/any", "$defs": {"any": True}},
    ],
)  # fmt: skip
def test_a_schema_with_references_is_followed(schema):
    tools = Toolset.of([Tool("good", schema, {})], ToolChoice())
    assert tools.check("good", {"y": 1}) == '{"y": 1}'


def test_a_reference_to_nothing_is_named():
    with pytest.raises(SchemaError, match="'#/\\$defs/gone' leads to nothing"):
        Toolset.of([Tool("bad", {"properties": {"x": {"$ref": "#/$defs/gone"}}}, {})], ToolChoice())


def test_what_does_not_fit_a_schema_that_is_within_itself_is_found_however_deeply_it_is_nested():
    either = [{"properties": {"x": {"$ref": "#/$defs/e"}}, "required": ["x", kind]} for kind in ("and", "or")]
    tools = Toolset.of([Tool("deep", {"$ref": "#/$defs/e", "$defs": {"e": {"anyOf": either}}}, {})], ToolChoice())
    arguments = {}
    for _ in range(60):
        arguments = {"x": arguments}
    with pytest.raises(BadCallError, match="do not fit the tool's schema"):
        tools.check("deep", arguments)
