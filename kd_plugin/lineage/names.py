"""Names of models as people, gateways and cards write them: one form of each, and its parts."""

from __future__ import annotations

import re
import unicodedata

# Letters of other scripts that look like Latin ones; NFKC leaves them apart
_LOOKALIKES = str.maketrans("асԁеһіјӏорԛѕтухѡԝɡοαρν", "acdehijlopqstuxwwgoapv")
_HYPHENS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\ufe58\ufe63\uff0d\u00ad"
# Who serves or resells closed models puts a name of this kind before the model's own
_VENDORS = ("openai", "anthropic", "google", "xai", "x-ai", "azure", "amazon", "aws", "bedrock", "vertex-ai", "vertex")
_VENDOR = re.compile(rf"^(?:[a-z]{{2,7}}\.)?(?:{'|'.join(map(re.escape, _VENDORS))})[.-]+(?=.)")


def normalised(name: str) -> str:
    """Return a name in one form: NFKC, lower case, one kind of hyphen for blanks, underscores and dashes.

    What cannot be seen (zero-width characters, soft hyphens) is left out, and letters of other scripts that look like
    Latin ones become those.
    """
    if name.isascii():  # the same as below, at a tenth of its cost: cards have many words
        text = re.sub(r"[\x00-\x1f\x7f]", "", name.lower())
    else:
        text = unicodedata.normalize("NFKC", name).lower()
        seen = (c for c in text if unicodedata.category(c) not in ("Cf", "Cc", "Mn"))
        text = "".join("-" if c in _HYPHENS[:-1] else c for c in seen).translate(_LOOKALIKES)
    return re.sub(r"[\s_-]+", "-", text).strip("-/ ")


def model_parts(name: str) -> tuple[str, list[str]]:
    """Return the organisation of a hub id, if any, and the parts that may be a model's own name, last first.

    Gateways write a vendor before the name (``openai/gpt-4o``, ``us.anthropic.claude-v2``) and vendors a ``:`` or ``@``
    after it.
    """
    *path, last = normalised(name.strip().removesuffix(":latest")).split("/")
    parts = [part for piece in reversed(re.split(r"[:@]", last)) if (part := piece.strip("-. "))]
    return (path[-1] if path else ""), parts


def without_vendor(part: str) -> str:
    """Return a model's own name without the vendor that stands before it: ``OpenAI GPT-4o``."""
    return _VENDOR.sub("", part)


def is_vendor(organisation: str) -> bool:
    """Whether an organisation serves or resells closed models, so that what it names is its own."""
    return without_vendor(f"{organisation}-x") == "x"
