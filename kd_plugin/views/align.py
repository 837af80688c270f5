"""Align a response in the student's tokens with the same response in a teacher's, by the bytes of its text.

A *chunk* is a smallest span of the text whose two ends are token boundaries on both sides: one token each where the
tokenizers agree, some tokens against some where they do not. The tokens that end a response are one chunk of their
own. Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083) and TRL's GOLD start from such spans too.

Shape suffixes: n tokens of the student, m of the teacher, k chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kd_plugin.divergence.across.sorted_tokens import Flags, Ints
from kd_plugin.views.tokens import ReadText, TokenText


@dataclass(frozen=True)
class Alignment:
    """One response in two tokenizers.

    Attributes:
        tokens: (m,) the teacher's token ids, its end of turn among them where the response ended.
        student_ends: (k,) student tokens up to the end of each chunk; they rise strictly, like all ends.
        teacher_ends: (k,) teacher tokens up to the end of each chunk.
        readable: (k,) False where a chunk holds bytes that are no text, or a token that the teacher does not know.
        ended: whether the response did.
        student_bytes: (n,) bytes of the text up to the end of each student token.
        teacher_bytes: (m,) likewise of each teacher token.
        raw: the text, as bytes.
    """

    tokens: tuple[int, ...]
    student_ends: Ints
    teacher_ends: Ints
    readable: Flags
    ended: bool
    student_bytes: Ints
    teacher_bytes: Ints
    raw: bytes

    def __len__(self) -> int:
        return len(self.student_ends)

    @cached_property
    def student_sizes(self) -> Ints:
        """(k + 1,) student tokens in each chunk, and behind the last."""
        return _differences(np.concatenate([self.student_ends, [len(self.student_bytes)]]))

    @cached_property
    def teacher_sizes(self) -> Ints:
        """(k + 1,) teacher tokens in each chunk, and behind the last."""
        return _differences(np.concatenate([self.teacher_ends, [len(self.tokens)]]))

    def of_used(self, used: Ints) -> tuple[Flags, Flags]:
        """Return (k + 1,) which chunks can be compared, and which the teacher cannot have written.

        All student tokens of both are ``used``. The last stands for what is behind the chunks, which is neither. Nor is
        the last unreadable chunk of a response that did not end: its last character may have been cut.
        """
        flags = np.zeros(len(self.student_bytes) + 1, np.int64)
        flags[used + 1] = 1
        found = np.zeros((2, len(self) + 1), bool)
        whole = _differences(flags.cumsum()[self.student_ends]) == self.student_sizes[:-1]
        found[:, :-1] = whole & self.readable, whole & ~self.readable
        found[1, -2:] &= self.ended
        return found[0], found[1]


def align(
    ids: Sequence[int], student: TokenText, teacher: TokenText, *, ended: bool, teacher_end: int | None
) -> Alignment:
    """Align one response; see :func:`align_all`."""
    (found,) = align_all([ids], student, teacher, ended=[ended], teacher_ends=[teacher_end])
    return found


def align_all(
    responses: Sequence[Sequence[int]],
    student: TokenText,
    teacher: TokenText,
    *,
    ended: Sequence[bool],
    teacher_ends: Sequence[int | None],
) -> list[Alignment]:
    """Align responses of the student with their text in the teacher's tokens.

    Args:
        responses: the student's tokens, with the one that ends a response where it ``ended``.
        student: the text of the student's tokens.
        teacher: the text of the teacher's tokens.
        ended: for each whether its last token ends it.
        teacher_ends: for each the teacher's token of that role; None where a response never ends.

    Raises:
        DataError: which token stands for what cannot be told, see :class:`~kd_plugin.views.tokens.TokenText`.
    """
    reads = [student.read(ids[:-1] if end else ids, teacher) for ids, end in zip(responses, ended, strict=True)]
    written = teacher.write_all([read.text for read in reads])
    return [
        _aligned(read, tokens, teacher_bytes, teacher, end, teacher_end)
        for read, (tokens, teacher_bytes), end, teacher_end in zip(reads, written, ended, teacher_ends, strict=True)
    ]


def _aligned(
    read: ReadText, tokens: list[int], teacher_bytes: Ints, teacher: TokenText, ended: bool, teacher_end: int | None
) -> Alignment:
    student_bytes, raw = read.ends, read.text.encode("utf-8")
    common = _in_both(student_bytes, teacher_bytes)
    student_ends = np.searchsorted(student_bytes, common, side="right")
    teacher_ends = np.searchsorted(teacher_bytes, common, side="right")
    readable = np.ones(len(common), bool)
    for first, stop in read.unreadable.tolist():
        readable[np.searchsorted(common, first, side="right") : np.searchsorted(common, stop, side="left") + 1] = False
    if teacher.kind != "bytes" and teacher.unknown is not None:  # byte-level tokenizers know every byte
        unknown = np.flatnonzero(np.asarray(tokens) == teacher.unknown)
        readable[np.searchsorted(teacher_ends, unknown, side="right")] = False
    if ended and teacher_end is not None:
        tokens = [*tokens, teacher_end]
        last = student_bytes[-1:] if len(student_bytes) else np.zeros(1, np.int64)
        student_bytes = np.concatenate([student_bytes, last + 1])
        teacher_bytes = np.concatenate([teacher_bytes, last + 1])
        student_ends = np.concatenate([student_ends, [len(student_bytes)]])
        teacher_ends = np.concatenate([teacher_ends, [len(tokens)]])
        readable = np.concatenate([readable, [True]])
    elif ended:
        student_bytes = np.append(student_bytes, student_bytes[-1:] + 1 if len(student_bytes) else 1)
    return Alignment(tuple(tokens), student_ends, teacher_ends, readable, ended, student_bytes, teacher_bytes, raw)


def end_of_turn(tokenizer: Any, *, chat: bool, options: dict[str, Any] | None = None) -> int | None:
    """Return the token by which a model ends its turn: what its chat template puts behind an answer, else its eos.

    Args:
        tokenizer: of the model.
        chat: whether prompts are rendered by a chat template.
        options: arguments of ``apply_chat_template``, as the prompts are rendered with.
    """
    end: int | None = tokenizer.eos_token_id
    template = (options or {}).get("chat_template") or getattr(tokenizer, "chat_template", None)
    if not chat or template is None:
        return end
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "kd0answer"}]
    text = tokenizer.apply_chat_template(
        messages, **{**(options or {}), "tokenize": False, "add_generation_prompt": False}
    )
    _, found, after = str(text).rpartition("kd0answer")
    if not found or not after.strip():
        return end
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    first = next(iter(tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]), None)
    return first if first in special else end


def _in_both(first: Ints, second: Ints) -> Ints:
    """Return the positive numbers that stand in both, which never fall."""
    if not len(second):
        return second
    is_in = second[np.minimum(second.searchsorted(first), len(second) - 1)] == first
    is_in[1:] &= first[1:] != first[:-1]
    return first[is_in & (first > 0)]


def _differences(rising: Ints) -> Ints:
    """Return each number less the one before it, the first as it is."""
    found = rising.copy()
    found[1:] -= rising[:-1]
    return found
