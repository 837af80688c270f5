"""Which bytes of a text each token of a tokenizer stands for, in both directions.

Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece (with a leading space, with byte fallback) say it in their
tokens' own names, to the byte, also where a token ends inside a character. Where the names do not give the text back,
as for WordPiece, or because a tokenizer normalises, its offsets say it, to the character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from kd_plugin.divergence.across.sorted_tokens import Ints
from kd_plugin.errors import ConfigError, DataError

# Marks of the same role; a model has those of one line as tokens, or none
THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
)
_PROBE = "Hello, world! 42\n  def f(x):"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNREADABLE = "\ufffd"


@dataclass(frozen=True)
class ReadText:
    """What a response says, and where its tokens end in it.

    Attributes:
        text: the response, with U+FFFD for bytes that are no text.
        ends: (n,) int64, for each token the bytes of ``text`` up to its end; they never fall.
        unreadable: (u, 2) int64, the bytes of ``text`` that stand for what is no text, from and to.
    """

    text: str
    ends: Ints
    unreadable: Ints


class TokenText:
    """The text of a tokenizer's tokens.

    Args:
        tokenizer: of transformers.
        name: how messages call its model, such as ``"teacher 'math'"``.

    Attributes:
        kind: ``bytes`` (byte-level), ``sentencepiece``, or ``offsets`` where its tokens' names do not give the text.

    Raises:
        ConfigError: it gives neither the text of its tokens nor their offsets.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.name = name
        self._names: list[str] = _by_id(self.tokenizer)
        self.added = {i: str(token.content) for i, token in self.tokenizer.added_tokens_decoder.items()}
        self.special = frozenset(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._added_texts = frozenset(self.added.values())
        self.unknown = self.tokenizer.unk_token_id
        self.kind, self._has_prefix = self._probed()

    @cached_property
    def table(self) -> list[bytes]:
        """The bytes of each token, by id; of ``offsets`` what is known of them without their neighbours."""
        convert = _byte_level if self.kind == "bytes" else _sentencepiece
        found = [convert(name) for name in self._names]
        for i, content in self.added.items():
            found[i] = content.encode("utf-8")
        return found

    def counterpart(self, content: str) -> str:
        """Return the text of this tokenizer's token of the role that a token ``content`` of another one has."""
        role = next((marks.index(content) for marks in THINKING if content in marks), None)
        if role is None or content in self._added_texts:
            return content
        return next((marks[role] for marks in THINKING if marks[role] in self._added_texts), content)

    def texts(self, other: TokenText | None = None) -> list[bytes | None]:
        """Return what each token stands for in a response, by id; None for special tokens without a text.

        Args:
            other: the tokenizer that reads the response, as which thinking marks stand; None for this one.
        """
        marks = {mark for line in THINKING for mark in line}
        found: list[bytes | None] = list(self.table)
        for i, content in self.added.items():
            is_text = i not in self.special or content in marks
            found[i] = (content if other is None else other.counterpart(content)).encode("utf-8") if is_text else None
        return found

    def read(self, ids: Sequence[int], other: TokenText) -> ReadText:
        """Return the text that tokens of this tokenizer stand for, as the model of another tokenizer reads it.

        Special tokens stand as their own text, but for thinking marks, which stand as the other tokenizer's.

        Args:
            ids: tokens without the one that ends the response.
            other: the tokenizer that will read the text.

        Raises:
            DataError: the tokens' text cannot be told.
        """
        if self.kind == "offsets":
            return self._read_by_offsets(ids)
        parts = [self.table[i] for i in ids]
        if self._has_prefix and parts and parts[0][:1] == b" " and ids[0] not in self.added:
            parts[0] = parts[0][1:]
        for at, i in enumerate(ids):
            if i in self.added:
                parts[at] = other.counterpart(self.added[i]).encode("utf-8")
        raw, ends = b"".join(parts), np.cumsum([0, *map(len, parts)])[1:]
        try:
            return ReadText(raw.decode("utf-8"), ends, np.zeros((0, 2), np.int64))
        except UnicodeDecodeError:
            return _repaired(raw, ends)

    def write(self, text: str) -> tuple[list[int], Ints]:
        """Tokenize a text; see :meth:`write_all`."""
        return self.write_all([text])[0]

    def write_all(self, texts: Sequence[str]) -> list[tuple[list[int], Ints]]:
        """Tokenize texts; return for each the ids, and for each token the bytes of the text up to its end.

        Raises:
            DataError: neither the tokens' names nor their offsets say where they end.
        """
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [self._ends(text, list(ids)) for text, ids in zip(texts, found, strict=True)]

    def _ends(self, text: str, ids: list[int]) -> tuple[list[int], Ints]:
        raw = text.encode("utf-8")
        if not ids:
            return ids, np.zeros(0, np.int64)
        if self.kind != "offsets":
            parts = [self.table[i] for i in ids]
            whole = b"".join(parts)
            if self._has_prefix and whole == b" " + raw:
                parts[0], whole = parts[0][1:], raw
            if whole == raw:
                return ids, np.cumsum([0, *map(len, parts)])[1:]
        if not self.tokenizer.is_fast:
            raise DataError(
                f"The tokenizer of {self.name} changes the text that it reads ({text[:40]!r}), and cannot say which "
                "token stands for what: it is no fast tokenizer and has no offsets. Take one with a tokenizer.json."
            )
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return ids, _ends_by_offsets(offsets, text)

    def _probed(self) -> tuple[str, bool]:
        """Say whose names give a text back, and whether a space is put before it."""
        ids = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        raw = _PROBE.encode()
        for kind, convert in (("bytes", _byte_level), ("sentencepiece", _sentencepiece)):
            whole = b"".join(convert(self._names[i]) for i in ids)
            if whole in (raw, b" " + raw):
                return kind, whole != raw
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer of {self.name} ({type(self.tokenizer).__name__}) gives no offsets, and the names of "
                "its tokens do not give the text back, so a response cannot be aligned with it. Take one with a "
                "tokenizer.json."
            )
        return "offsets", False

    def _read_by_offsets(self, ids: Sequence[int]) -> ReadText:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again, ends = self.write(text)
        if list(again) != list(ids):
            raise DataError(
                f"The tokenizer of {self.name} does not give a response back from its text ({text[:40]!r}), so which "
                "token stands for what cannot be told. Take a student with a byte-level or SentencePiece tokenizer."
            )
        return ReadText(text, ends, np.zeros((0, 2), np.int64))


def _by_id(tokenizer: Any) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    names = [""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        names[i] = token
    return names


def _ends_by_offsets(offsets: Sequence[tuple[int, int]], text: str) -> Ints:
    """Return where tokens end, in bytes; what no token covers belongs to the next one, or to the last."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])
    starts, ends = np.array(offsets, np.int64).T
    ends = np.maximum.accumulate(ends)
    # A token that begins before the one ahead of it ends shares a character with it: a cut one, or a space put before
    ends[:-1] = np.minimum(ends[:-1], np.minimum.accumulate(starts[:0:-1])[::-1])
    ends[-1] = len(text)
    return np.asarray(before[ends], np.int64)


def _repaired(raw: bytes, ends: Ints) -> ReadText:
    """Put U+FFFD in the place of each run of bytes that is no text; tokens that end inside end behind it."""
    pieces: list[str] = []
    moved, unreadable, at, length = ends.copy(), [], 0, 0
    while at < len(raw):
        try:
            rest = raw[at:].decode("utf-8")
            bad, after = len(raw), len(raw)
        except UnicodeDecodeError as error:
            rest = raw[at : at + error.start].decode("utf-8")
            bad, after = at + error.start, at + error.end
        inside = (ends > at) & (ends <= bad)
        moved[inside] = ends[inside] - at + length
        pieces.append(rest)
        length += bad - at
        if after > bad:
            moved[(ends > bad) & (ends <= after)] = length + len(_UNREADABLE.encode())
            unreadable.append((length, length + len(_UNREADABLE.encode())))
            pieces.append(_UNREADABLE)
            length += len(_UNREADABLE.encode())
        at = after
    return ReadText("".join(pieces), moved, np.array(unreadable, np.int64).reshape(-1, 2))


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    found = {chr(b): b for b in kept}
    moved = (b for b in range(256) if b not in set(kept))
    return found | {chr(256 + n): b for n, b in enumerate(moved)}


def _byte_level(token: str) -> bytes:
    table = _bytes_of_characters()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode("utf-8", "replace")


def _sentencepiece(token: str) -> bytes:
    fallback = _BYTE.fullmatch(token)
    return bytes([int(fallback[1], 16)]) if fallback else token.replace("▁", " ").encode("utf-8", "replace")
