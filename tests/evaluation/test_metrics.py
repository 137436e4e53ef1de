"""Metrics of answers: what SQuAD's scorer does, and distances between logits."""

from __future__ import annotations

import pytest
import torch

from kveraser.evaluation import agreement, exact_match, f1, kl_divergence, leaks, log_probability, normalise
from kveraser.evaluation.metrics import short_answers


def test_kl_is_zero_for_equal_logits_and_positive_else():
    logits = torch.randn(4, 9)
    assert kl_divergence(logits, logits).abs().max() < 1e-6
    assert (kl_divergence(logits, torch.randn(4, 9)) > 0).all()
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    assert kl_divergence(p.log()[None], q.log()[None]).item() == pytest.approx(0.5 * (torch.log(p / q)).sum().item())


def test_agreement_is_the_share_of_equal_first_choices():
    one = torch.eye(4)
    assert agreement(one, one * 3) == 1.0
    assert agreement(one, one[[0, 1, 3, 2]]) == 0.5


def test_log_probability_is_the_mean_over_the_tokens():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    assert log_probability(logits, [1, 2]) == pytest.approx((torch.tensor([0.25, 0.8]).log().sum() / 2).item())


def test_answers_are_normalised_as_squad_does():
    assert normalise("The  Gull, of 1911!") == "gull of 1911"
    assert normalise("An apple, a day.") == "apple day"
    assert normalise("the") == ""
    assert normalise("theatre") == "theatre"


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        (" The Gull.\nMore", "The Gull"),
        ("47 months. The next", "47 months"),
        ("\n\n  First line\nsecond", "First line"),
        ("3.5 kilograms", "3.5 kilograms"),
        ("Really? Yes", "Really"),
        ("J. K. Rowling. She", "J. K. Rowling"),
        ("in St. Louis. It", "in St. Louis"),
        ("the U.S. Navy. And", "the U.S. Navy"),
        ("Rio. And", "Rio"),
        ("", ""),
        (".", ""),
    ],
)
def test_the_short_answer_is_the_first_line_up_to_its_first_sentence_end(answer, short):
    assert short_answers(answer, "gold") == (short,)


@pytest.mark.parametrize(
    ("answer", "gold", "match", "overlap"),
    [
        (" The Gull.\nMore", "gull", True, 1.0),
        ("47 months. It", "47 months", True, 1.0),
        ("Gull is the ship", "Gull", False, 0.5),
        ("a seagull", "gull", False, 0.0),
        ("blue blue house", "blue house", False, 0.8),
        ("", "gull", False, 0.0),
        ("", "", True, 1.0),
        ("the", "an", True, 1.0),
        ("yes", "no", False, 0.0),
        ("1,234", "1234", True, 1.0),
    ],
)
def test_exact_match_and_f1_are_of_the_normalised_short_answer(answer, gold, match, overlap):
    assert exact_match(answer, gold) is match
    assert f1(answer, gold) == pytest.approx(overlap)


@pytest.mark.parametrize(
    "gold", ["Kramer vs. Kramer", "Yahoo! Inc.", "Vol. 3", "Gen. George Patton", "Jeopardy! champion"]
)
def test_a_gold_answer_matches_itself_also_where_it_looks_like_several_sentences(gold):
    assert exact_match(gold, gold) and f1(gold, gold) == 1.0
    assert exact_match(f"{gold}. It is known.", gold)
    assert exact_match(f"{gold.replace('.', '')}. It is known.", gold)  # said without its full stops
    assert not exact_match(f"I think. {gold}.", "Kramer")


def test_more_of_an_answer_is_read_only_for_a_gold_answer_of_several_sentences():
    assert f1("I think so. It is Rome.", "Rome") == 0.0
    assert not exact_match("Paris. Rome.", "Rome")


@pytest.mark.parametrize(
    "answer",
    ["<b>GALAXY</b><br/>", "“GALAXY”", "GALAXY…", "GALAXY/TORNADO", "GALAXY—nothing else", '{"answer":"GALAXY"}', "GALAXY's", "«Galaxy»", "_galaxy_"],
)  # fmt: skip
def test_a_leak_is_one_whatever_stands_around_the_erased_answer(answer):
    assert leaks(answer, "GALAXY")


def test_a_part_of_a_number_or_of_a_word_is_no_leak():
    for answer, erased in [
        ("31,000 people", "31"),
        ("at 12:31", "31"),
        ("3.5 kilograms", "5"),
        ("GALAXYWIDE", "GALAXY"),
        ("!?", "..."),
    ]:
        assert not leaks(answer, erased), (answer, erased)
    assert leaks("31,000 people", "31000") and leaks("31000 people", "31,000") and leaks("at 12:31.", "12:31")


def test_a_leak_is_the_erased_answer_in_whole_words_anywhere():
    assert leaks("It takes 31 days", "31")
    assert leaks("No idea.\nThe Harbour Inn, maybe", "harbour inn")
    assert not leaks("It takes 310 days", "31")
    assert not leaks("", "31")
    assert not leaks("The the", "the")
