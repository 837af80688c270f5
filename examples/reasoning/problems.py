"""Problems with long solutions, in which one wrong step spoils the rest.

Each letter follows from the two before it, by a table that must be known by heart. A problem gives the mark of the
last step and the first four letters, ``J:Am,By,Cq,Dp,``, and its solution goes on until that mark:
``Ep,Fh,Gv,Hs,Iz,Jq,.``. A step is its mark, which counts, and its letter; the last two are the answer. No two pairs
of letters lead to the same one, so who has lost the way does not come back to it.

``#`` takes back the character before it: whoever sees that a character was wrong writes ``#`` and the right one. What a
model writes that makes no mistakes has no ``#`` in it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!$%&*+=?@^~<>"
TAKE_BACK, END = "#", "."
GIVEN = 4  # letters of a prompt
SHORT, MIDDLE, LONG = 10, 20, 40  # steps: a step is three tokens
LENGTHS = (4, LONG)  # of the problems that are trained on


@cache
def table() -> Mapping[str, str]:
    """Return the letter that follows each pair of letters."""
    following = {}
    for second in LETTERS:
        order = list(LETTERS)
        random.Random(f"table {second}").shuffle(order)
        following |= {first + second: letter for first, letter in zip(LETTERS, order, strict=True)}
    return following


@dataclass(frozen=True)
class Problem:
    """A sequence to be continued.

    Attributes:
        first: its first two letters.
        steps: letters to find.
    """

    first: str
    steps: int

    @classmethod
    def draw(cls, draw: random.Random, steps: int) -> Problem:
        """Draw one of a length."""
        return cls(draw.choice(LETTERS) + draw.choice(LETTERS), steps)

    @property
    def sequence(self) -> list[str]:
        """All steps, those that are given with them."""
        letters = list(self.first)
        while len(letters) < GIVEN + self.steps:
            letters.append(table()[letters[-2] + letters[-1]])
        return [f"{mark}{letter}," for mark, letter in zip(MARKS, letters, strict=False)]

    @property
    def prompt(self) -> str:
        """What is asked."""
        sequence = self.sequence
        return f"{sequence[-1][0]}:{''.join(sequence[:GIVEN])}"

    @property
    def solution(self) -> str:
        """Its steps and the end."""
        return "".join(self.sequence[GIVEN:]) + END

    @property
    def row(self) -> dict[str, str]:
        """The problem as a row of a dataset; the answer is its last two steps: one might be right by chance."""
        return {"prompt": self.prompt, "answer": "".join(self.sequence[-2:]) + END}


def problems(count: int, steps: tuple[int, int], seed: int, without: frozenset[str] = frozenset()) -> list[Problem]:
    """Draw problems whose lengths lie in a range, both ends included; none has a prompt of ``without``."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        one = Problem.draw(draw, draw.randint(*steps))
        if one.prompt not in without:
            found.append(one)
    return found


@cache
def held_out(count: int) -> Mapping[int, list[Problem]]:
    """Return different problems of each of three lengths, which nobody is trained on."""
    found = {}
    for steps in (SHORT, MIDDLE, LONG):
        firsts = [a + b for a in LETTERS for b in LETTERS]
        found[steps] = [Problem(first, steps) for first in random.Random(f"held out {steps}").sample(firsts, count)]
    return found


def held_out_prompts(count: int) -> frozenset[str]:
    """Return the prompts of :func:`held_out`."""
    return frozenset(one.prompt for group in held_out(count).values() for one in group)


def settled(text: str) -> str:
    """Return what stands when everything that was taken back is gone."""
    kept: list[str] = []
    for character in text:
        if character == TAKE_BACK:
            del kept[-1:]
        else:
            kept.append(character)
    return "".join(kept)


def solved(response: str, row: Mapping[str, Any]) -> bool:
    """Verify a response: whether it ends with the row's answer."""
    return settled(response.strip()).endswith(row["answer"])


def with_slips(draw: random.Random, text: str, rate: float) -> tuple[str, list[bool]]:
    """Return a text in which some letters are wrong and taken back, and which of its characters are to be learned.

    A wrong letter is not to be learned; what follows it is.
    """
    written, learned = [], []
    for character in text:
        if character in LETTERS and draw.random() < rate:
            written += [draw.choice(LETTERS.replace(character, "")), TAKE_BACK, character]
            learned += [False, True, True]
        else:
            written.append(character)
            learned.append(True)
    return "".join(written), learned


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every character that a problem or a solution may have."""
    characters = LETTERS + MARKS + TAKE_BACK + END + ":,"
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *characters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token=None)
