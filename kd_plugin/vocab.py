"""The vocabulary contract: two distributions can be compared only over the same tokens.

Equal sizes do not mean equal vocabularies, and unequal sizes may: Qwen2.5 pads its output rows to 151936 or
152064 for one and the same tokenizer. So tokenizers are compared token by token, and rows of an output head
beyond the tokenizer are cut on both sides before the softmax. A head may also be shorter than its tokenizer
(Gemma-3-1B: 262,144 rows for 262,145 tokens): a token without a row has no probability, and no embedding either, so
that both sides are cut to the rows that both have, and a text with such a token is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kd_plugin.errors import DataError, VocabularyError

TEMPLATE = "chat template"  # how a difference of two templates is called
_SHOWN = 3  # differing tokens named in an error


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's token ids, special tokens and chat template.

    Attributes:
        tokens: token string to id, added tokens included.
        special_ids: role (``eos_token`` ...) to id, for the roles that are set.
        chat_template: the Jinja text, or None.
        rows: of the output heads that speak it, where some are fewer than the tokens; None for as many as needed.
    """

    tokens: Mapping[str, int]
    special_ids: Mapping[str, int]
    chat_template: str | None = None
    rows: int | None = None

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
        if self.fingerprint == other.fingerprint:
            return
        by_id, other_by_id = _by_id(self.tokens), _by_id(other.tokens)
        different = [i for i in sorted(by_id.keys() | other_by_id.keys()) if by_id.get(i) != other_by_id.get(i)]
        shown = "; ".join(
            f"id {i} is {_show(by_id, i)} for the {mine} and {_show(other_by_id, i)} for the {theirs}"
            for i in different[:_SHOWN]
        )
        raise VocabularyError(
            f"The {mine} ({len(self.tokens)} tokens) and the {theirs} ({len(other.tokens)} tokens) have different "
            f"vocabularies: {len(different)} ids differ, first: {shown}. Distributions can only be compared over "
            f"the same tokens: choose a {theirs.split()[0]} of the same tokenizer family, or train on its text."
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
