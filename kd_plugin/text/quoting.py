"""Text that others wrote, shown as data: JSON in which nothing has the form of a request or of a reply.

What is escaped, as JSON may escape any character, so that it is the same text to whoever reads JSON:

- what cannot be seen: control characters, marks of direction, zero-width characters, tags, fillers;
- beginnings of the control tokens of chat templates (``<|im_end|>``, ``[INST]``, ``</think>``), speakers' names
  (``Assistant:``), and holes of templates (``{{key}}``);
- the words that the form of a reply is made of, in any case, spacing and look-alike letters: a weak teacher copies a
  number that stands in that form (docs/results.md).

JSON escapes line breaks, so a response begins no line of a request. Each of its lines has a mark before it that tells
data from request: *spotlighting* (Hines et al., arXiv 2403.14720).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

MARK = "|"
_UNSEEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # categories: control, format, private use, surrogates, separators
# Letters and marks by category, and yet nothing to see: fillers, variation selectors, the joiner of graphemes
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# Letters of the words below that look alike (confusables of Unicode TR 39), where compatibility forms do not say so
_ALIKE = {
    ord(look): letter
    for letter, looks in {
        "b": "ьƅʙвβ", "c": "сϲᴄ", "d": "ԁɗᴅ", "e": "еєεҽᴇ", "f": "ғϝꜰ", "g": "ɡԍցɢ", "i": "іιıɪӏ", "n": "пոηɴ",
        "o": "оοσօᴏ", "p": "рρᴘ", "r": "гᴦʀ", "s": "ѕꜱƽ", "t": "тτᴛ", "v": "ѵνᴠ", "w": "ԝѡωᴡ",
    }.items()
    for look in looks
}  # fmt: skip
_DIGITS = {"o": "[o0]", "e": "[e3]", "s": "[s5$]", "i": "[i1!|]", "t": "[t7+]"}  # that stand for letters
_GAP = r"[\W_]{0,3}"  # between the letters of a word


def _word(letters: str) -> str:
    first, *others = (_DIGITS.get(letter, letter) for letter in letters)
    return f"({first}){_GAP}{_GAP.join(others)}"


_KEY = rf"(?={_GAP}[0-9a-f]{{6,}})"
# Each group that matches is escaped
_REPLY = {
    "verdict": re.compile(_word("verdict"), re.IGNORECASE),
    "score": re.compile(rf"{_word('score')}(?:{_GAP}([=:])|(?=[^\n]{{0,24}}?\d))", re.IGNORECASE),
    "first wrong step": re.compile(rf"{_word('firstwrongstep')}(?:{_GAP}([=:]))?", re.IGNORECASE),
    "begin": re.compile(_word("begin") + _KEY, re.IGNORECASE),
    "end": re.compile(_word("end") + _KEY, re.IGNORECASE),
}
_FORMS = [
    re.compile(r"(<)(?=[|/!<▁a-zA-Z])"),
    re.compile(r"(\[)(?=/?[A-Z_]{3,}\])"),
    re.compile(r"(\{)(?=[{%#])"),
    re.compile(r"\b(?:human|assistant|user|system|instruction|response)\s{0,2}(:)", re.IGNORECASE),
    *_REPLY.values(),
]


def quoted(value: Any) -> str:
    """Return text, or lists and mappings of texts, as JSON on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(key)}: {quoted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(quoted, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    shown = [json.dumps(character, ensure_ascii=False)[1:-1] for character in value]
    for at in _escaped(value):
        shown[at] = "".join(f"\\u{unit:04x}" for unit in _utf16(value[at]))
    return '"' + "".join(shown) + '"'


def quoted_lines(steps: Sequence[str], first: int = 1, left_out: Container[int] = ()) -> str:
    """Return the steps of a response, each as JSON on a line of its own behind the mark and its number.

    Args:
        steps: as :func:`~kd_plugin.text.prompts.steps_of` cuts them.
        first: number of the first of them.
        left_out: numbers of those that are not shown; where none would be, it is an empty response that is shown.
    """
    shown = [(number, step) for number, step in enumerate(steps, first) if number not in left_out]
    return "\n".join(f"{MARK} {number} {quoted(step)}" for number, step in shown or [(first, "")])


def reply_words(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the words of a reply that a text holds, in whatever disguise: which one, where it begins, where it ends."""
    folded, places = _folded(text)
    for word, form in _REPLY.items():
        for found in form.finditer(folded):
            yield word, places[found.start()], places[found.end() - 1] + 1


def _escaped(text: str) -> Iterator[int]:
    """Yield where the characters stand that are escaped."""
    if not (text.isascii() and text.isprintable()):
        yield from (at for at, one in enumerate(text) if _is_unseen(one))
    folded, places = _folded(text)
    for form in _FORMS:
        for found in form.finditer(folded):
            yield from (places[found.start(n)] for n in range(1, form.groups + 1) if found.start(n) >= 0)


def _folded(text: str) -> tuple[str, Sequence[int]]:
    """Return the text in plain letters, without what cannot be seen, and where each of its characters comes from."""
    if text.isascii() and text.isprintable():
        return text, range(len(text))
    letters: list[str] = []
    places: list[int] = []
    for at, character in enumerate(text):
        if _is_unseen(character):
            continue
        for one in unicodedata.normalize("NFKD", character):
            if not unicodedata.combining(one):
                letters.append(_ALIKE.get(ord(one)) or _ALIKE.get(ord(one.lower()[0])) or one)
                places.append(at)
    return "".join(letters), places


def _is_unseen(character: str) -> bool:
    if character in "\t\n\r":  # JSON has names for these
        return False
    return unicodedata.category(character) in _UNSEEN or _BLANK.match(character) is not None


def _utf16(character: str) -> list[int]:
    """Return the code units by which JSON escapes a character."""
    code = ord(character)
    if code < 0x10000:
        return [code]
    return [0xD800 + ((code - 0x10000) >> 10), 0xDC00 + ((code - 0x10000) & 0x3FF)]
