"""The tokens that a cache's ids mean, kept beside its targets so that a student that shares a part of them can learn.

``vocabulary.json.gz`` is no part of the manifest, whose fingerprint of the tokens tells that it is right. A cache
without the file teaches students of its own tokenizer alone.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from kd_plugin.cache.files import publish_new, temporary_name
from kd_plugin.errors import CacheCorruptionError
from kd_plugin.vocab import Vocabulary

FILE = "vocabulary.json.gz"


def keep_tokens(directory: Path, vocabulary: Vocabulary) -> None:
    """Write the tokens beside a cache that has been begun, unless they are there."""
    if (directory / FILE).exists():
        return
    content = {"tokens": dict(vocabulary.tokens), "added": sorted(vocabulary.added)}
    temporary = temporary_name(directory / "tmp", FILE)
    packed = gzip.compress(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"), mtime=0)
    temporary.write_bytes(packed)
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
    way_out = f"Put back an earlier copy, or delete {path}: the cache then teaches students of its own tokenizer."
    try:
        content = json.loads(gzip.decompress(path.read_bytes()).decode("utf-8", "surrogatepass"))
        tokens = {str(token): int(index) for token, index in content["tokens"].items()}
        found = Vocabulary(tokens, {}, added=frozenset(map(str, content["added"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise CacheCorruptionError(f"{path} is damaged ({error}). {way_out}") from error
    if found.fingerprint != fingerprint:
        raise CacheCorruptionError(f"{path} holds other tokens than the cache was captured with. {way_out}")
    return found
