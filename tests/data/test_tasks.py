"""Tasks: the answer is in the text, where it is said to be, and found by other means too."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from hybridjax.config import UserError
from hybridjax.data.babilong import MOVES, PEOPLE, PLACES, THINGS
from hybridjax.data.sources import SOURCES, build_source, source
from hybridjax.data.text import documents
from hybridjax.data.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()
LENGTH = 600
TASKS = {
    "one needle": dict(type="retrieval"),
    "needles": dict(
        type="retrieval", facts=10, queries=3, key_length=2, separator="=", alike=3, together=4
    ),
    "value": dict(type="variables", hops=3, name_length=2, together=3),
    "names": dict(type="variables", chains=3, ask="names"),
    "words": dict(type="words", letters=2),
    "qa1": dict(type="babilong", task="qa1", facts=6),
    "qa2": dict(type="babilong", task="qa2", facts=8),
    "qa3": dict(type="babilong", task="qa3", facts=8),
}


def task(name="one needle", *, tokenizer=BYTES, length=LENGTH, split="tune", seed=0, **changes):
    spec = source(**TASKS[name] | changes)
    return build_source(spec, tokenizer, seq_len=length, split=split, seed=seed)


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


def examples(name, count=20, length=LENGTH):
    made = task(name, length=length)
    return [made.example(random.Random(i), length) for i in range(count)]


def spelled(example):
    """The text, and each answer with the place where it begins."""
    text, answers = BYTES.decode(example.tokens), []
    for number in range(1, example.answers.max() + 1):
        [place] = np.nonzero(example.answers == number)
        assert (np.diff(place) == 1).all()
        answers.append((text[place[0] : place[-1] + 1], place[0]))
    return text, answers


# ---------------------------------------------------------------- all of them


def test_documents_depend_on_seed_split_and_number_alone(name):
    tokens = lambda i=3, **options: task(name, **options)[i]["tokens"].tobytes()
    assert tokens() == tokens()
    assert len({tokens(), tokens(4), tokens(seed=1), tokens(split="train")}) == 4
    few, many = (task(name).exam(n, 700).tokens for n in (2, 4))
    np.testing.assert_array_equal(few, many[:2])
    assert few.shape == (2, 700)


def test_documents_fill_a_row_and_weigh_answers(name):
    for i in range(20):
        document = task(name)[i]
        assert len(document["tokens"]) == LENGTH + 1 and document["answers"].max() > 0
        weights = np.where(document["answers"] > 0, 1, 0.01)
        np.testing.assert_allclose(document["loss_weights"], weights)


def test_the_text_says_the_answer_where_it_is_said_to(name):
    for example in examples(name):
        text, answers = spelled(example)
        assert len(answers) == len(example.evidence)
        for (answer, place), (start, stop) in zip(answers, example.evidence):
            assert LENGTH - 60 < place and stop <= place
            if name != "words":  # which has no one place
                assert answer.strip(" .") in text[start:stop]


def test_evidence_lies_at_any_depth(name):
    if name == "words":
        pytest.skip("has no one place")
    starts = [e.evidence[:, 0] for e in examples(name, count=300, length=1200)]
    counts, _ = np.histogram(np.concatenate(starts), bins=4, range=(0, 1200))
    # the answer of a story or chain is more often said early, or late
    assert counts.min() > (45 if "needle" in name else 8)


def test_a_lesson_asks_what_was_said_before(name):
    for i in range(5):
        example = task(name).lesson(random.Random(i), LENGTH)
        text, answers = spelled(example)
        assert len(text) == LENGTH and len(answers) == len(example.evidence)
        for (answer, place), (start, stop) in zip(answers, example.evidence):
            assert name == "words" or answer.strip(" .") in text[start:stop] and stop <= place


def test_an_exam_knows_where_it_asks(name):
    exam = task(name).exam(4, LENGTH)
    assert exam.exact(exam.targets).all() and not exam.exact(exam.targets + 1).any()
    for i in range(4):
        for a, asked in enumerate(exam.asked[i], 1):
            one_wrong = exam.targets.copy()
            one_wrong[i, asked] += 1  # the first token of that answer
            assert exam.answers[i, asked] == a
            wrong = np.argwhere(exam.exact(one_wrong) == 0)
            np.testing.assert_array_equal(wrong, [[i, a - 1]])


# ---------------------------------------------------------------- solved by other means


def solve_facts(text, asked):
    """Every `#key=value;` and `?key=value;` of a text, and that all questions are right."""
    facts = re.findall(r"#([a-z]+)=?([0-9]+);", text)
    questions = re.findall(r"\?([a-z]+)=?([0-9]+);", text)
    assert len(dict(facts)) == len(facts) and questions
    assert asked == [dict(facts)[key] for key, _ in questions]
    return facts, questions


def solve_variables(text, asked):
    told = dict(re.findall(r"#([a-z]+)=([a-z0-9]+);", text))
    [(name, _)] = re.findall(r"\?([a-z]+)=([0-9]+);", text)
    hops = 0
    while not name.isdigit():
        name, hops = told[name], hops + 1
    assert asked == [name]
    return hops


def test_needles():
    for example in examples("needles"):
        text, answers = spelled(example)
        facts, questions = solve_facts(text, [a for a, _ in answers])
        assert (len(facts), len(questions)) == (10, 3) and text.endswith(f"{questions[-1][1]};")
        near = lambda a, b: sum(x != y for x, y in zip(a, b)) == 1
        keys = [key for key, _ in facts]
        for key, _ in questions:  # 10 keys: three, and look-alikes of them
            assert sum(near(key, other) for other in keys) >= 2
        starts = sorted(m.start() for m in re.finditer("#", text))
        steps = Counter(np.diff(starts).tolist())
        assert steps[len("#ab=12;")] >= 5  # three runs of four, in which two places are free


def test_variables():
    hops = [solve_variables(t, [a for a, _ in ans]) for t, ans in map(spelled, examples("value"))]
    assert set(hops) == {4}  # one from its name to the last link, one for each
    for example in examples("value"):
        text, _ = spelled(example)
        order = [m.group(1) for m in re.finditer(r"#([a-z]+)=", text)]
        for name, told in re.findall(r"#([a-z]+)=([a-z]+);", text):
            assert order.index(told) < order.index(name)


def test_names_of_a_value():
    for example in examples("names"):
        text, answers = spelled(example)
        told = re.findall(r"#([a-z])=([a-z0-9]+);", text)
        value, names = re.findall(r"\?([0-9]+)=([a-z,]+);", text)[0]
        holders = [value]
        for name, giver in told:
            holders += [name] if giver in holders else []
        assert names.split(",") == holders[1:] == [a for a, _ in answers]
        assert len(told) == 9


def test_words():
    for example in examples("words"):
        text, answers = spelled(example)
        counts = Counter(re.findall("#([a-z]{2});", text)).most_common()
        assert [word for word, _ in counts[:3]] == [a for a, _ in answers]
        assert counts[2][1] > counts[3][1]
        slots = (LENGTH - len("?ab,cd,ef;")) // len("#ab;")
        assert [n for _, n in counts] == [
            int(slots * k**-2 / 1.644934) for k in range(2, len(counts) + 2)
        ]


def told(text):
    """The story: who did what, in order."""
    verbs = "|".join([*(f"{verb} the" for verb in MOVES), r"[a-z ]+? the"])
    pattern = rf" ({'|'.join(PEOPLE)}) ({verbs}) ({'|'.join(PLACES + THINGS)})\."
    return [(m[1], m[3], m[2]) for m in re.finditer(pattern, text)]


@pytest.mark.parametrize("name", ["qa1", "qa2", "qa3"])
def test_stories(name):
    for example in examples(name, count=60):
        text, [(answer, _)] = spelled(example)
        where, holder, trail = {}, {}, {thing: [] for thing in THINGS}
        for person, noun, verb in told(text):
            if noun in PLACES:
                assert where.get(person) != noun
                where[person] = noun
                moved = [t for t, h in holder.items() if h == person]
            elif verb[:-4] in ("got", "took", "grabbed", "picked up"):
                assert noun not in holder and trail[noun][-1:] in ([], [where[person]])
                holder[noun], moved = person, [noun]
            else:
                assert holder.pop(noun) == person
                moved = []
            for thing in moved:
                if trail[thing][-1:] != [where[person]]:
                    trail[thing].append(where[person])
        question = re.search(r"Where (is|was) (the )?(\w+)( before the (\w+))?\?", text)
        if name == "qa1":
            right = where[question[3]]
        elif name == "qa2":
            right = trail[question[3]][-1]
        else:
            assert trail[question[3]][-1] == question[5]
            right = trail[question[3]][-2]
        assert answer == f" {right}." and text.endswith(answer)
        assert len(told(text)) == TASKS[name]["facts"]


def test_the_rest_is_the_split():
    heldout = set(" ".join(documents("heldout")).split())
    text, _ = spelled(task("qa1", split="heldout").example(random.Random(0), 3000))
    rest = re.sub(rf" ({'|'.join(PEOPLE)})[^.]+\.| Where[^?]+\?| \w+\.$", "", text)
    assert len(set(rest.split()) & heldout) > 0.9 * len(set(rest.split()))


# ---------------------------------------------------------------- grades


@pytest.mark.parametrize(
    "name, written, right, question, expected",
    [
        ("one needle", ["30"], ["30"], "", [True]),
        ("one needle", ["31"], ["30"], "", [False]),
        ("names", ["b", "c", "b"], ["a", "b", "c"], "", [False, True, True]),
        ("words", ["bc", "ab", "xy"], ["ab", "bc", "cd"], "", [True, True, False]),
        ("qa1", [" office. And so on"], [" office."], "Where is Mary?", [True]),
        ("qa1", [" Office or kitchen."], [" office."], "Where is Mary?", [False]),
        ("qa1", [" nowhere. office."], [" office."], "Where is Mary?", [False]),
        ("qa3", [" office, then kitchen"], [" office."], "Where ... before the kitchen?", [True]),
        ("qa1", [" office."], [" office."], "Mary went to the office. Where is Mary?", [True]),
    ],
)
def test_grades(name, written, right, question, expected):
    assert task(name).grade(written, right, question) == expected


def test_chance():
    assert (task("one needle").chance, task("one needle").guess) == (0.01, 0.25)
    assert (task("value").chance, task("value").guess) == (0.01, 0.5)
    assert (task("names").chance, task("names").guess) == (1 / 26, 1 / 9)
    assert (task("qa2").chance, task("qa2").guess) == (1 / 6, 1 / 6)


# ---------------------------------------------------------------- other tokens, and faults


def test_tokens_of_words(bpe, name):
    tokenizer = load_tokenizer(str(bpe))
    exam = task(name, tokenizer=tokenizer).exam(3, LENGTH)
    for targets, answers in zip(exam.targets, exam.answers):
        last = tokenizer.decode(targets[answers == answers.max()])
        assert tokenizer.decode(targets).endswith((last, f"{last};"))


@pytest.mark.parametrize(
    "name, length, changes, message",
    [
        ("value", 60, {}, "8 assignments of 7 tokens and questions of 7 tokens need 70 tokens"),
        ("value", LENGTH, dict(ask="all"), "ask is 'all': use 'value' or 'names'"),
        ("names", LENGTH, dict(hops=9), "30 variables need as many names: raise name_length"),
        ("value", LENGTH, dict(chains=11, value_length=1), "11 chains need as many values"),
        ("value", LENGTH, dict(chains=0), "chains is 0 and hops 3: use 1, 0 or more"),
        ("words", 90, {}, "in 91 tokens the 3 most frequent words of 2 letters occur too seldom"),
        ("words", 4096, dict(letters=1), "words need as many spellings: raise letters"),
        ("qa1", 100, {}, "6 facts and a question may need 272 tokens, not 101"),
        ("qa3", LENGTH, dict(facts=2), "facts is 2: qa3 needs at least 3"),
        ("qa1", LENGTH, dict(task="qa4"), "task is 'qa4': use one of qa1, qa2, qa3"),
    ],
)
def test_faults(name, length, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        task(name, length=length, **changes)


def test_every_task_is_a_source():
    assert {options["type"] for options in TASKS.values()} <= set(SOURCES)
