"""One response in two tokenizers: chunks cover it once, end where tokens end on both sides, and are the smallest such.

What the tokenizers' own ``decode`` makes of the tokens up to each chunk's end is the oracle.
"""

import random
from itertools import pairwise

import pytest

from kd_plugin.views.align import align
from kd_plugin.views.tokens import TokenText
from tests.tokenizers import random_text, small_tokenizers

SMALL = small_tokenizers()
STUDENTS = ("bytes", "byte_level", "byte_level_nfc", "sentencepiece")


def decoded(tokenizer, ids):
    """The text of tokens, without the space that a tokenizer puts before a text."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def check(ids, text, student, teacher, ended=False):
    """Align, and hold the result against what the two tokenizers decode."""
    end = 2 if ended else None
    found = align([*ids, 2] if ended else ids, student, teacher, ended=ended, teacher_end=end)
    body, theirs = list(ids), list(found.tokens[: len(found.tokens) - ended])
    # Every token of both sides is in exactly one chunk, and both sides' ends rise together
    assert found.student_ends[-1] == len(body) + ended and found.teacher_ends[-1] == len(found.tokens)
    for ends in (found.student_ends, found.teacher_ends):
        assert all(a < b for a, b in pairwise([0, *ends.tolist()]))
    assert (found.student_sizes[:-1] > 0).all() and found.student_sizes[-1] == 0
    if not found.readable.all() or text is None or decoded(teacher.tokenizer, theirs) != text:
        return found  # one of them reads another text than is there, so that decoding is no oracle
    # The same text up to each end, and no further place where both sides have a token's end
    mine = {decoded(student.tokenizer, body[:i]): i for i in range(1, len(body) + 1)}
    others = {decoded(teacher.tokenizer, theirs[:j]): j for j in range(1, len(theirs) + 1)}
    both = mine.keys() & others.keys()
    whole = {key for key in both if key and "\ufffd" not in key and text.startswith(key)}
    chunks = dict(zip(found.student_ends.tolist(), found.teacher_ends.tolist(), strict=True))
    assert {mine[key]: others[key] for key in whole}.items() <= chunks.items()
    for s, t in list(chunks.items())[: len(chunks) - ended]:
        both = decoded(student.tokenizer, body[:s]), decoded(teacher.tokenizer, theirs[:t])
        assert both[0] == both[1] or "\ufffd" in both[0]  # an end inside a character, which they show differently
    return found


def try_strings(tokenizers, students, count, seed):
    """Align ``count`` random texts, each for a pair of tokenizers that is drawn with it."""
    draw = random.Random(seed)
    texts = {name: TokenText(one, name) for name, one in tokenizers.items()}
    compared = 0
    for _ in range(count):
        text, student, teacher = random_text(draw), draw.choice(students), draw.choice(list(tokenizers))
        ids = tokenizers[student](text, add_special_tokens=False)["input_ids"]
        same = decoded(tokenizers[student], ids) == text
        try:
            found = check(ids, text if same else None, texts[student], texts[teacher], ended=draw.random() < 0.5)
        except Exception as error:
            raise AssertionError(f"{student} -> {teacher}: {text!r}") from error
        compared += same and decoded(tokenizers[teacher], found.tokens[: found.teacher_ends[-1]]).startswith(text)
    assert compared > count / 3


def try_tokens(tokenizers, students, count, seed):
    """Align random tokens, as an untrained student writes them: cut characters, special tokens, no text at all."""
    draw = random.Random(seed)
    texts = {name: TokenText(one, name) for name, one in tokenizers.items()}
    unreadable = 0
    for _ in range(count):
        student, teacher = draw.choice(students), draw.choice(list(tokenizers))
        ids = [draw.randrange(len(tokenizers[student])) for _ in range(draw.randint(1, 40))]
        try:
            found = check(ids, None, texts[student], texts[teacher], ended=draw.random() < 0.5)
        except Exception as error:
            raise AssertionError(f"{student} -> {teacher}: {ids}") from error
        unreadable += not found.readable.all()
    assert unreadable > count / 20


def test_random_texts_between_tokenizers_of_all_families():
    try_strings(SMALL, STUDENTS, 400, seed=0)


def test_random_tokens_between_tokenizers_of_all_families():
    try_tokens(SMALL, STUDENTS[:3], 300, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_random_texts_between_real_tokenizers(real):
    try_strings(real, list(real), 10_000, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_tokens_between_real_tokenizers(real):
    try_tokens(real, list(real), 3_000, seed=3)
