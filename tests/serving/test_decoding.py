"""Stop texts, characters of several tokens, sampling."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import make_tokenizer, text_model
from kveraser import ErasableContext
from kveraser.serving.decoding import Decoding, GrowingText, Sampling


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(text, stop):
    text = text.encode("utf-8", "ignore").decode()
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    state = GrowingText(tokenizer, tuple(stop))
    out = ""
    for token in ids:
        out += state.push(token)
        if state.stopped:
            break
    out += state.finish()
    if not state.stopped:
        assert out == whole
        assert not any(s in out for s in stop)
    else:
        assert whole.startswith(out)
        assert any(whole.startswith(s, len(out)) for s in stop)


def byte_tokenizer():
    """One that writes what it has no token for in bytes, as Llama 2's and Mistral's; its tokens 0 to 255 are the bytes."""
    words = ["▁", "▁the", "▁cat", "a"]
    vocabulary = {token: n for n, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def told(tokenizer, ids):
    """The pieces of a text, the last one what `finish` gives."""
    state = GrowingText(tokenizer)
    return [*(state.push(token) for token in ids), state.finish()]


def test_a_character_that_was_told_stays_when_one_behind_it_is_never_completed():
    face, begun, the, cat = list("😀".encode()), [0xF0, 0x9F], 257, 258
    pieces = told(byte_tokenizer(), [cat, *face, *begun, the, cat, *face, *begun])
    assert "".join(pieces) == "cat😀\ufffd\ufffd the cat😀\ufffd\ufffd"
    assert pieces[:8] == ["cat", "", "", "", "😀", "", "", "\ufffd\ufffd the"]
    assert "".join(told(byte_tokenizer(), [cat, *begun, the])) == "cat\ufffd\ufffd the"


RUNS = [
    [0x41],
    [0x80],
    [0xC3, 0x80],
    [0xC3],
    [0xE2, 0x82, 0xAC],
    [0xE2, 0x82],
    [0xF0, 0x9F, 0x98, 0x80],
    [0xF0],
    [256],
    [257],
    [259],
]


@given(st.lists(st.sampled_from(RUNS), max_size=10))
def test_no_run_of_bytes_is_too_broken_to_be_told(runs):
    ids = [token for run in runs for token in run]
    tokenizer = byte_tokenizer()
    text, whole = "".join(told(tokenizer, ids)), tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text == whole or "\ufffd" in text
    words = {256: " ", 257: " the", 258: " cat", 259: "a"}
    said = iter(
        b"".join(words[token].encode() if token in words else bytes([token]) for token in ids).decode(errors="ignore")
    )
    assert all(letter in said for letter in text.replace("\ufffd", ""))  # and in its order


def _continue(**options):
    model, tokenizer = text_model(), make_tokenizer()
    context = ErasableContext(model, tokenizer)
    logits = context.advance(tokenizer.encode("the code of the"))
    decoding = Decoding(Sampling(max_tokens=12, **options), tokenizer, context.backend.ends, context.device)
    pieces = [decoding.draw(logits)]
    while not pieces[-1].finish_reason:
        pieces.append(decoding.draw(context.advance([decoding.token])))
    return "".join(piece.text for piece in pieces), pieces, context


def test_greedy_decoding_is_that_of_generate():
    text, pieces, context = _continue()
    plain = ErasableContext(text_model(), make_tokenizer())
    plain.append_ids(make_tokenizer().encode("the code of the"))
    ids = plain.generate_ids(max_new_tokens=12, eos_token_id=None)
    assert context.live_ids[-11:] == ids[:-1]
    assert text == make_tokenizer().decode(ids, skip_special_tokens=True)
    assert pieces[-1].finish_reason == "length"


def test_a_seed_gives_the_same_reply_and_another_one_another():
    first = _continue(temperature=1.0, seed=7)[0]
    assert _continue(temperature=1.0, seed=7)[0] == first
    assert any(_continue(temperature=1.0, seed=seed)[0] != first for seed in (8, 9, 10))
    for options in ({"temperature": 5.0, "top_p": 1e-9}, {"temperature": 1e-300}):
        assert _continue(seed=3, **options)[0] == _continue()[0]


def test_logprobs_are_those_of_the_sampled_tokens():
    pieces = _continue(logprobs=3)[1]
    for piece in pieces:
        (entry,) = piece.tokens
        assert entry.top[0] == (entry.id, entry.logprob)
        assert len(entry.top) == 3
        assert entry.logprob <= 0


def test_one_token_to_draw_from_is_the_most_likely_one():
    assert _continue(temperature=1.5, top_k=1, seed=3)[0] == _continue()[0]
    assert _continue(temperature=1.5, top_k=3, seed=3)[0] == _continue(temperature=1.5, top_k=3, seed=3)[0]


def test_the_stop_text_that_ended_a_reply_is_told():
    whole, _, _ = _continue()
    stop = whole[2:4]
    *_, last = _continue(stop=("never there", stop))[1]
    assert (last.finish_reason, last.stopped_by) == ("stop", stop)
