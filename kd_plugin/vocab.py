"""The vocabulary contract: two distributions can be compared only over the same tokens.

Equal sizes do not mean equal vocabularies, and unequal sizes may: Qwen2.5 pads its output rows to 151936 or
152064 for one and the same tokenizer. So tokenizers are compared token by token, and rows of an output head
beyond the tokenizer are cut on both sides before the softmax. A head may also be shorter than its tokenizer
(Gemma-3-1B: 262,144 rows for 262,145 tokens): a token without a row has no probability, and no embedding either, so
that both sides are cut to the rows that both have, and a text with such a token is refused.

Two vocabularies may also share a part: one contains the other, as Qwen3's does Qwen2.5's, or each has a few tokens of
its own. They are compared over the shared ids, with all other tokens of a side as one outcome, its *rest*.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kd_plugin.errors import DataError, VocabularyError

TEMPLATE = "chat template"  # how a difference of two templates is called
_SHOWN = 3  # differing tokens named in an error


@dataclass(frozen=True)
class SharedTokens:
    """The token ids that mean one token to a student and to a teacher; a side's other ids are its *rest*.

    Attributes:
        runs: ranges [first, last) of shared ids, ascending and apart.
        student_size: rows of the student's head, V.
        teacher_size: rows of the teacher's.
    """

    runs: tuple[tuple[int, int], ...]
    student_size: int
    teacher_size: int

    @classmethod
    def of_ids(cls, ids: Iterable[int], student_size: int, teacher_size: int) -> SharedTokens:
        """Build it from the shared ids, ascending."""
        runs: list[tuple[int, int]] = []
        for index in ids:
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return cls(tuple(runs), student_size, teacher_size)

    @property
    def count(self) -> int:
        """Number of shared ids."""
        return sum(last - first for first, last in self.runs)

    @property
    def student_has_rest(self) -> bool:
        """Whether the student has tokens that the teacher has not."""
        return self.count < self.student_size

    @property
    def teacher_has_rest(self) -> bool:
        """Whether the teacher has tokens that the student has not."""
        return self.count < self.teacher_size

    def __contains__(self, token: int) -> bool:
        at = bisect_right(self.runs, (token, self.student_size + self.teacher_size))
        return at > 0 and token < self.runs[at - 1][1]

    def ids(self) -> list[int]:
        """List the shared ids, ascending."""
        return [index for first, last in self.runs for index in range(first, last)]

    def rest(self, size: int) -> list[int]:
        """List the ids below ``size``, that of one side, that are not shared."""
        ends = [0, *(end for run in self.runs for end in run), size]
        return [index for first, last in zip(ends[::2], ends[1::2], strict=True) for index in range(first, last)]

    def within(self, others: Iterable[SharedTokens | None]) -> SharedTokens:
        """Return this with only those ids that other teachers, None for one that shares all, share too."""
        ids = set(self.ids()).intersection(*(other.ids() for other in others if other is not None))
        return SharedTokens.of_ids(sorted(ids), self.student_size, self.teacher_size)

    def readable(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a text the teacher can read: those before the first that is not shared."""
        return next((at for at, token in enumerate(ids) if token not in self), len(ids))


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's token ids, special tokens and chat template.

    Attributes:
        tokens: token string to id, added tokens included.
        special_ids: role (``eos_token`` ...) to id, for the roles that are set.
        chat_template: the Jinja text, or None.
        rows: of the output heads that speak it, where some are fewer than the tokens; None for as many as needed.
        added: token strings that were added beside what the tokenizer was trained to merge, special ones among them.
    """

    tokens: Mapping[str, int]
    special_ids: Mapping[str, int]
    chat_template: str | None = None
    rows: int | None = None
    added: frozenset[str] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read a transformers tokenizer, or the tokenizer inside a processor."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        specials = {
            role: tokenizer.convert_tokens_to_ids(token)
            for role, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        template = tokenizer.chat_template
        return cls(
            tokens=dict(tokenizer.get_vocab()),
            special_ids=specials,
            chat_template=template if isinstance(template, str) else None,
            added=frozenset(tokenizer.get_added_vocab()),
        )

    @cached_property
    def size(self) -> int:
        """Number of rows over which a softmax is taken: the largest id plus one, or all that the heads have."""
        return self.needed if self.rows is None else min(self.needed, self.rows)

    @cached_property
    def needed(self) -> int:
        """Rows that a head with all tokens has: the largest id plus one."""
        return max(self.tokens.values()) + 1

    @property
    def is_cut(self) -> bool:
        """Whether some tokens have no row in an output head."""
        return self.size < self.needed

    def within(self, rows: int | None) -> Vocabulary:
        """Return this vocabulary for heads of ``rows`` rows; None, or enough of them, changes nothing."""
        return self if rows is None or rows >= self.size else replace(self, rows=rows)

    def require_rows(self, texts: Iterable[Sequence[int]], what: str) -> None:
        """Refuse token lists with a token that an output head has no row for: nothing can read or score it.

        Args:
            texts: token ids.
            what: how the message calls them, such as ``"prompt"``.

        Raises:
            DataError: names the first of them and the token.
        """
        if not self.is_cut:
            return
        for number, ids in enumerate(texts):
            largest = max(ids, default=0)
            if largest >= self.size:
                raise DataError(
                    f"{what} {number} holds token {largest} ({_show(_by_id(self.tokens), largest)}), but a model of "
                    f"this run has {self.size} rows, fewer than its tokenizer has tokens: it can neither read nor "
                    "score that token. Remove the row, or the token from its text."
                )

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of the token-to-id map, in order of ids."""
        digest = hashlib.sha256()
        for token, index in sorted(self.tokens.items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def template_fingerprint(self) -> str | None:
        """Sha256 of the chat template, or None without one."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    def require_same_tokens(self, other: Vocabulary, mine: str, theirs: str) -> None:
        """Refuse ``other`` unless every id means the same token on both sides.

        Args:
            other: the vocabulary to compare with.
            mine: how messages call this side, such as ``"student"``.
            theirs: how messages call the other side, such as ``"teacher 'math'"``.

        Raises:
            VocabularyError: names the first ids that differ, and the way out.
        """
        if self.fingerprint != other.fingerprint:
            raise self._different(other, mine, theirs)

    def shared_with(self, other: Vocabulary, mine: str = "student", theirs: str = "teacher") -> SharedTokens | None:
        """Return what this vocabulary, the student's, shares with a teacher's; None where both have the same tokens.

        One must contain the other, or more than half of the larger must be shared. A token that was added under
        another id is not shared. A merged token under another id is that of another tokenizer, which also splits text
        in other places.

        Args:
            other: the teacher's.
            mine: how messages call this side.
            theirs: how messages call the other side.

        Raises:
            VocabularyError: they share too little, or merged tokens have other ids.
        """
        if self.fingerprint == other.fingerprint:
            return None
        key = other.fingerprint, other.size
        if key not in self._shared:
            if any(token not in self.added and token not in other.added for token in self.moved(other)):
                raise self._different(other, mine, theirs)
            by_id, other_by_id = _by_id(self.tokens), _by_id(other.tokens)
            size = min(self.size, other.size)
            same = [i for i in range(size) if by_id.get(i) == other_by_id.get(i)]  # also where neither has a token
            tokens = sum(i in by_id for i in same)
            contains = tokens == min(len(self.tokens), len(other.tokens))
            if not contains and 2 * tokens <= max(len(self.tokens), len(other.tokens)):
                raise self._different(other, mine, theirs)
            self._shared[key] = SharedTokens.of_ids(same, self.size, other.size)
        return self._shared[key]

    def moved(self, other: Vocabulary) -> list[str]:
        """List the tokens that both sides have under different ids, in the order of their ids here."""
        return [token for token, index in self.tokens.items() if other.tokens.get(token, index) != index]

    @cached_property
    def _shared(self) -> dict[tuple[str, int], SharedTokens]:
        return {}

    def _different(self, other: Vocabulary, mine: str, theirs: str) -> VocabularyError:
        by_id, other_by_id = _by_id(self.tokens), _by_id(other.tokens)
        different = [i for i in sorted(by_id.keys() | other_by_id.keys()) if by_id.get(i) != other_by_id.get(i)]
        shown = "; ".join(
            f"id {i} is {_show(by_id, i)} for the {mine} and {_show(other_by_id, i)} for the {theirs}"
            for i in different[:_SHOWN]
        )
        return VocabularyError(
            f"The {mine} ({len(self.tokens)} tokens) and the {theirs} ({len(other.tokens)} tokens) have different "
            f"vocabularies: {len(different)} ids differ, first: {shown}. Distributions can only be compared over "
            f"the same tokens: choose a {theirs.split()[0]} of the same tokenizer family, or train on its "
            "text, which any student can: `kd-plugin capture` with targets: text, then teacher_text in the place of "
            "teacher_cache."
        )

    def differences_that_change_lengths(self, other: Vocabulary) -> list[str]:
        """List what differs beside the tokens: the end-of-sequence token and the chat template.

        A teacher that ends its answers with another token never rewards the student for stopping.
        """
        found = []
        eos, other_eos = self.special_ids.get("eos_token"), other.special_ids.get("eos_token")
        if eos != other_eos:
            found.append(f"end-of-sequence token (id {eos} against id {other_eos})")
        if self.template_fingerprint != other.template_fingerprint:
            found.append(TEMPLATE)
        return found


def _by_id(tokens: Mapping[str, int]) -> dict[int, str]:
    return {index: token for token, index in sorted(tokens.items(), reverse=True)}


def _show(by_id: Mapping[int, str], index: int) -> str:
    return repr(by_id[index]) if index in by_id else "nothing"
