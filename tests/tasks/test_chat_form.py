"""The chat form: examples written by a chat template, the same text that the template gives for the whole conversation."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import make_tokenizer
from kveraser.evaluation import read_parts
from kveraser.tasks import ChatForm, EraseExample, Filler, Sizes, Turn, as_task, tasks
from kveraser.tasks.asking import recall, with_line
from kveraser.tasks.base import ask

TRIMMING = (
    "<s>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] | trim }} </s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
PLAIN = EraseExample("The hall is old. ", "The code is 1. ", "It is red. ", ask("Which code?", "The code is"), "2", "1")


def tokenizer(template=None):
    found = copy.deepcopy(make_tokenizer())
    found.chat_template = found.chat_template if template is None else template
    return found


def filler():
    return Filler([f"Passage {n} is about things of {1900 + n}. It has {n} sentences of some length. They go on in the town."
                   for n in range(40)], lambda text: len(text.split()))  # fmt: skip


def drawn(name, seed=0, count=3, split="eval"):
    return list(itertools.islice(as_task(name).examples(filler(), Sizes.context(200), split, seed), count))


def conversation(example):
    """What is said in an example, told without the chat form's own means."""
    said = [(turn.role, "".join(text for text, _ in turn.pieces).strip()) for turn in example.turns]
    return said or [("user", "".join(text for text, _ in example.parts).strip()),
                    ("assistant", "OK.")]  # fmt: skip


def rendered(tool, said, prompt=True):
    entries = [{"role": role, "content": content} for role, content in said]
    return tool.apply_chat_template(entries, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("template", [None, TRIMMING])
def test_the_texts_are_what_the_template_gives_for_the_whole_conversation(name, template):
    tool = tokenizer(template)
    for plain in drawn(name):
        (example,) = ChatForm(tool)([plain])
        context = "".join(text for text, _ in example.parts)
        whole = rendered(tool, [*conversation(plain), ("user", example.chat.words)])
        assert context + example.question == whole + example.chat.lead
        assert whole.startswith(context)
        assert (example.gap == " ") == bool(example.chat.lead)


@given(name=st.sampled_from(list(tasks())), seed=st.integers(0, 10_000), split=st.sampled_from(["train", "eval"]))
def test_spans_hold_what_they_held_and_all_markup_stays(name, seed, split):
    for plain in drawn(name, seed, 2, split):
        (example,) = ChatForm(make_tokenizer())([plain])
        before, after = ([text.strip() for text, erased in each.parts if erased] for each in (plain, example))
        assert after == before
        assert not any("<s>" in text or "</s>" in text for text in after)
        assert (example.gold, example.erased) == (plain.gold, plain.erased)


def test_spans_begin_and_end_with_tokens_in_a_context_and_no_token_is_put_before_the_template():
    from conftest import text_model

    for plain in (*drawn("needle"), *drawn("agent-trace")):
        (example,) = ChatForm(make_tokenizer())([plain])
        context = kv.ErasableContext(text_model(), make_tokenizer())
        spans = read_parts(context, example.parts, chat=True)
        assert [context.text_of(span) for span in spans] == [text for text, erased in example.parts if erased]
        assert context.text == "".join(text for text, _ in example.parts)


def test_several_examples_are_one_conversation_and_each_is_asked_about_at_its_end():
    tool = tokenizer()
    plain = [*drawn("needle", count=1), *drawn("agent-trace", count=1), *drawn("preference", count=1)]
    found = ChatForm(tool)(plain)
    context = "".join(text for example in found for text, _ in example.parts)
    said = [message for example in plain for message in conversation(example)]
    for example in found:
        assert context + example.question == rendered(tool, [*said, ("user", example.chat.words)]) + example.chat.lead
    assert context.count("Be kind.") == 1


def test_a_span_that_is_a_whole_message_leaves_an_empty_one():
    turns = (Turn("user", (("Call it.", False),)), Turn("assistant", (("call", False),)), Turn("user", (("Result: 1", True),)),
             Turn("assistant", (("Thanks.", False),)))  # fmt: skip
    plain = EraseExample("", "1", "", ask("What?"), None, "1", turns=turns)
    (example,) = ChatForm(make_tokenizer())([plain])
    kept = "".join(text for text, erased in example.parts if not erased)
    assert example.span == "Result: 1"
    assert "<s>user\n</s>\n<s>assistant\nThanks.</s>\n" in kept
    assert example.question == "<s>user\nWhat?\nAnswer with as few words as possible.</s>\n<s>assistant\n"
    assert example.gap == ""


def test_the_special_token_behind_a_reply_ends_it():
    end = make_tokenizer().convert_tokens_to_ids("</s>")
    assert ChatForm(tokenizer()).ends == ChatForm(tokenizer(TRIMMING)).ends == (end,)
    assert ChatForm(tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")).ends == ()


def test_no_template_and_templates_that_change_what_is_said_are_named():
    with pytest.raises(kv.OptionError, match="has no chat template"):
        ChatForm(tokenizer(""))
    with pytest.raises(kv.OptionError, match="does not show every message"):
        ChatForm(tokenizer("{{ messages[-1]['content'] }}"))
    with pytest.raises(kv.OptionError, match="changes what messages say"):
        ChatForm(tokenizer("{% for m in messages %}<s>{{ m['content'] | replace('old', 'new') }}</s>{% endfor %}"))(
            [PLAIN]
        )
    with pytest.raises(kv.KVEraserError, match="refuses"):
        ChatForm(tokenizer("{{ raise_exception('no assistant here') }}"))


def test_a_line_stands_before_the_question_or_behind_it_in_both_forms():
    (chat,) = ChatForm(make_tokenizer())([PLAIN])
    assert with_line(PLAIN, "Not so.", cached=False) == "\n\nNot so.\n\nQuestion: Which code?\nAnswer: The code is"
    assert with_line(PLAIN, "Not so.", cached=True) == "\n\nNot so.\nAnswer: The code is"
    assert with_line(chat, "Not so.", cached=False) == (
        "<s>user\nNot so.\n\nWhich code?</s>\n<s>assistant\nThe code is"
    )  # fmt: skip
    assert with_line(chat, "Not so.", cached=True) == "</s>\n<s>user\nNot so.</s>\n<s>assistant\nThe code is"


def test_what_was_taken_back_is_asked_for_with_and_without_the_line():
    (chat,) = ChatForm(make_tokenizer())([PLAIN])
    for cached in (False, True):
        for example in (PLAIN, chat):
            with_it, without = recall(example, "Not so.", cached=cached), recall(example, cached=cached)
            assert with_it.replace("Not so.\n\n" if example is chat else "\n\nNot so.", "") == without
            assert "Which code? Give the answer that was taken back" in without
            assert without.endswith("The code is")


@pytest.mark.model
@pytest.mark.parametrize("name", tasks())
def test_the_tokens_are_those_of_the_embedded_models_template_but_where_spans_begin_and_end(smollm, name):
    _, tool = smollm
    (plain,) = drawn(name, count=1)
    (example,) = ChatForm(tool)([plain])
    words = [*conversation(plain), ("user", example.chat.words)]
    assert "".join(text for text, _ in example.parts) + example.question == rendered(tool, words) + example.chat.lead
    whole = tool.encode(rendered(tool, words) + example.chat.lead, add_special_tokens=False)
    texts = [*(text for text, _ in example.parts if text), example.question]
    apart = [token for text in texts for token in tool.encode(text, add_special_tokens=False)]
    special = set(tool.all_special_ids)
    assert [token for token in apart if token in special] == [token for token in whole if token in special]
    assert len(apart) - len(whole) <= 2 * len(texts)


@pytest.mark.model
def test_the_embedded_model_ends_its_reply_with_the_end_of_turn(smollm):
    model, tool = smollm
    form = ChatForm(tool)
    context = kv.ErasableContext(model, tool)
    (example,) = form(
        [EraseExample("The hall is old. ", "It is red. ", "The code is 1234.", ask("Which code?"), "1234", "red")]
    )
    read_parts(context, example.parts, chat=True)
    reply = context.generate_ids(context.encode(example.question), max_new_tokens=48)
    assert reply[-1] in form.ends
    assert "1234" in context.decode(reply)
