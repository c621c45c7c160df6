import random
import re
import sys
import zlib

import numpy as np
import pytest

from hybridjax.config import UserError
from hybridjax.data.retrieval import Haystack, Retrieval, needle_batch
from hybridjax.data.text import documents
from hybridjax.data.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()
FORMS = {
    "q30": dict(),
    "q=30": dict(separator="="),
    "abc1234": dict(key_length=3, value_length=4),
}


def pattern(lead, *, key_length=1, value_length=2, separator=""):
    key, value = f"([a-z]{{{key_length}}})", f"([0-9]{{{value_length}}})"
    return re.compile(re.escape(lead) + key + re.escape(separator) + value + ";")


@pytest.fixture(params=FORMS, ids=list(FORMS))
def form(request):
    return FORMS[request.param]


def prompts(needles, tokenizer=BYTES):
    """The text before each answer, and the answer."""
    for tokens, targets, answers, [asked] in zip(
        needles.tokens, needles.targets, needles.answers, needles.asked
    ):
        yield tokenizer.decode(tokens[: asked + 1]), tokenizer.decode(targets[answers > 0])


@pytest.mark.parametrize("dense", [0.0, 1.0], ids=["one question", "dense"])
def test_documents_ask_what_they_state(form, dense):
    source = Retrieval(BYTES, 200, "train", 0, dense=dense, **form)
    asked = 0
    for i in range(50):
        document = source[i]
        text = BYTES.decode(document["tokens"])
        assert len(text) == 201
        facts = {m[1]: m for m in pattern("#", **form).finditer(text)}
        questions = list(pattern("?", **form).finditer(text))
        assert len(facts) == text.count("#") <= 4  # stated once, and nothing like it besides
        assert len(questions) == text.count("?")
        assert dense or (len(facts), len(questions), questions[0].end()) == (4, 1, 201)
        answers = np.zeros(201, int)
        for number, question in enumerate(questions, 1):
            assert facts[question[1]][2] == question[2]  # the same value
            assert facts[question[1]].start() < question.start()
            answers[slice(*question.span(2))] = number
        np.testing.assert_array_equal(document["answers"], answers)
        np.testing.assert_allclose(document["loss_weights"], np.where(answers, 1, 0.01))
        asked += len(questions)
    assert asked >= 50


def test_dense_share():
    source = Retrieval(BYTES, 128, "train", 0, dense=0.75)
    last = sum(
        source[i]["answers"][-2] == 1 and source[i]["answers"].max() == 1 for i in range(400)
    )
    assert 70 <= last <= 130


def test_document_is_a_function_of_seed_split_and_number():
    def tokens(number, seed=0, split="train"):
        return Retrieval(BYTES, 96, split, seed)[number]["tokens"].tobytes()

    assert tokens(7) == tokens(7)
    assert len({tokens(7), tokens(8), tokens(7, seed=1), tokens(7, split="tune")}) == 4
    assert zlib.crc32(tokens(7)) == 1400104642  # on every machine and Python


def test_haystack_is_the_text_of_its_split():
    heldout = re.sub("[#?]", " ", "\n".join(documents("heldout")))
    [[text, _]] = prompts(needle_batch(Haystack(BYTES, "heldout"), 0, 1, 400))
    longest = max(re.split(r"#[a-z]\d\d;|\?[a-z]$", text), key=len)
    assert len(longest) > 60 and longest in heldout + heldout


@pytest.mark.parametrize("length, facts", [(64, 1), (64, 4), (1000, 16), (300_000, 4)])
def test_needles(form, length, facts):
    haystack = Haystack(BYTES, "heldout", **form)
    needles = needle_batch(haystack, 3, 3, length, facts=facts)
    assert needles.tokens.shape == needles.targets.shape == (3, length)
    np.testing.assert_array_equal(needles.tokens[:, 1:], needles.targets[:, :-1])
    for i, (prompt, value) in enumerate(prompts(needles)):
        assert (prompt + value + ";").encode() == bytes(
            [needles.tokens[i, 0], *needles.targets[i].tolist()]
        )
        stated = {m[1]: m for m in pattern("#", **form).finditer(prompt)}
        assert len(stated) == prompt.count("#") == facts
        key = prompt[prompt.index("?") + 1 :].removesuffix(form.get("separator", ""))
        assert stated[key][2] == value
        assert stated[key].start() == len(prompt) - needles.distance[i, 0]
        assert stated[key].span() == tuple(needles.evidence[i, 0])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth(depth):
    needles = needle_batch(Haystack(BYTES, "tune"), 0, 20, 5000, depth=depth)
    start = needles.evidence[..., 0] / needles.asked
    np.testing.assert_allclose(start, depth, atol=0.005)


def test_random_depth_is_uniform():
    needles = needle_batch(Haystack(BYTES, "tune"), 0, 400, 2000)
    counts, _ = np.histogram(needles.distance, bins=4, range=(0, 2000))
    assert counts.min() > 70


def test_more_needles_extend_fewer():
    haystack = Haystack(BYTES, "tune")
    few, many = (needle_batch(haystack, 0, n, 100).tokens for n in (2, 5))
    np.testing.assert_array_equal(few, many[:2])
    assert not np.array_equal(few, needle_batch(haystack, 1, 2, 100).tokens)


def test_every_fact_is_asked_of_one_text(form):
    haystack = Haystack(BYTES, "heldout", text="no #a11; or ?a12; is a fact. " * 40, **form)
    tokens, questions, starts = haystack.questioned(random.Random(2), 400, 5)
    text = BYTES.decode(tokens)
    stated = {m[1]: m for m in pattern("#", **form).finditer(text)}
    assert len(text) == 400 and len(stated) == text.count("#") == 5 and "?" not in text
    asked = [pattern("?", **form).fullmatch(BYTES.decode(q)) for q in questions]
    assert [(stated[q[1]][2], stated[q[1]].start()) for q in asked] == [
        (q[2], start) for q, start in zip(asked, starts, strict=True)
    ]
    assert len({q[1] for q in asked}) == 5


@pytest.mark.parametrize("dense", [False, True])
def test_decoys_have_the_keys_of_facts_but_no_mark_or_are_numbers(form, dense):
    haystack = Haystack(BYTES, "tune", decoys=6, text="." * 500, **form)
    rng = random.Random(3)
    example = haystack.dense(rng, 400, 3) if dense else haystack.needle(rng, 400, 3)
    text = BYTES.decode(example.tokens)
    facts = {m[1] for m in pattern("#", **form).finditer(text)}
    decoys = re.findall(pattern(".", **form).pattern.replace(";", r"\."), text)
    numbers = sum(map(len, re.findall(rf"[0-9]{{{haystack.width},}}", text)))
    assert len(facts) == 3 and {key for key, _ in decoys} <= facts
    # Of a dense row the places are drawn, and not every clue gets one.
    assert 1 <= len(decoys) <= 3 and 1 <= numbers / haystack.width <= 3
    assert dense or len(decoys) == numbers / haystack.width == 3


def test_exact_match_needs_every_digit():
    needles = needle_batch(Haystack(BYTES, "tune"), 0, 3, 64)
    predictions = np.where(needles.answers > 0, needles.targets, 0)
    predictions[1, np.flatnonzero(needles.answers[1])[0]] = 0
    np.testing.assert_array_equal(needles.exact(predictions), [[1], [0], [1]])


def test_endless_and_sharded():
    source = Retrieval(BYTES, 64, "train", 0)
    assert len(source.dataset()) == sys.maxsize
    shard = source.dataset(slice(1, None, 3))
    for i in range(3):
        np.testing.assert_array_equal(shard[i]["tokens"], source[1 + 3 * i]["tokens"])


@pytest.mark.parametrize(
    "seq_len, options, message",
    [
        (20, dict(), "4 facts of 5 tokens and questions of 5 tokens need 25 tokens, not 21"),
        (40, dict(decoys=4), "8 facts and decoys of 5 tokens and questions of 5 tokens need"),
        (400, dict(facts=27), "27 facts need as many keys, not 26: raise key_length"),
        (400, dict(queries=5), "queries is 5: it must be from 1 to the 4 facts"),
        (400, dict(alike=26), "alike is 26: a letter has 0 to 25 others in its place"),
        (400, dict(together=0), "together is 0: it must be at least 1"),
    ],
    ids=["short", "decoys", "keys", "queries", "alike", "together"],
)
def test_faults(seq_len, options, message):
    with pytest.raises(UserError, match=message):
        Retrieval(BYTES, seq_len, "train", 0, **options)


def test_tokens_of_words(bpe):
    """With tokens of several characters, facts are still written a character each."""
    tokenizer = load_tokenizer(str(bpe))
    needles = needle_batch(Haystack(tokenizer, "tune"), 0, 5, 200)
    assert needles.tokens.shape == (5, 200)
    assert len(tokenizer.decode(needles.tokens.ravel())) > 5 * 200
    for prompt, value in prompts(needles, tokenizer):
        assert f"#{prompt[-1]}{value};" in prompt and prompt[-2] == "?"


def test_tokenizer_without_digits():
    class Words(ByteTokenizer):
        name = "words"

        def encode(self, text):
            return np.repeat(super().encode(text), 2)

    with pytest.raises(UserError, match="the tokenizer words has no token of its own for '#'"):
        Haystack(Words(), "train")
