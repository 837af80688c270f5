"""The tokens that a cache's ids mean, kept beside its targets so that a student that shares a part of them can learn.

``vocabulary.json`` is no part of the manifest, whose fingerprint of the tokens tells that it is right. A cache without
the file teaches students of its own tokenizer alone.
"""

from __future__ import annotations

from pathlib import Path

from kd_plugin.cache.files import publish_new, seal, temporary_name, unseal
from kd_plugin.errors import CacheCorruptionError
from kd_plugin.vocab import Vocabulary

FILE = "vocabulary.json"


def keep_tokens(directory: Path, vocabulary: Vocabulary) -> None:
    """Write the tokens beside a cache that has been begun, unless they are there."""
    if (directory / FILE).exists():
        return
    temporary = temporary_name(directory / "tmp", FILE)
    temporary.write_bytes(seal({"tokens": dict(vocabulary.tokens), "added": sorted(vocabulary.added)}))
    publish_new(temporary, directory / FILE)


def kept_tokens(directory: Path, fingerprint: str) -> Vocabulary | None:
    """Read the tokens of a cache; None where it has none.

    Args:
        directory: the cache.
        fingerprint: of its tokens, as the manifest has it.

    Raises:
        CacheCorruptionError: the file is damaged, or of other tokens.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    way_out = "Put back an earlier copy, or delete it: the cache then teaches students of its own tokenizer."
    content = unseal(path, way_out)
    try:
        tokens = {str(token): int(index) for token, index in content["tokens"].items()}
        found = Vocabulary(tokens, {}, added=frozenset(map(str, content["added"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheCorruptionError(f"{path} is no list of tokens ({error}). {way_out}") from error
    if not tokens or found.fingerprint != fingerprint:
        raise CacheCorruptionError(f"{path} holds other tokens than the cache was captured with. {way_out}")
    return found
