"""What a model's or dataset's directory, or its repository on the hub, says of its terms.

The files may come from strangers. Where the hub cannot be reached, what stood in the way is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.front_matter import front_of, has_begun, parse_yaml
from kd_plugin.lineage.graph import Evidence
from kd_plugin.lineage.hashing import sha256_text
from kd_plugin.lineage.origins import MERGE_FILES, Bases, bases_of, prose_of, writers_of
from kd_plugin.lineage.readings import copyright_lines, printable, read_licence, recognise
from kd_plugin.lineage.record import traces_in
from kd_plugin.lineage.registry import UNKNOWN, Registry

_MAX_TEXT = 1 << 20  # bytes
_MAX_NOTICE = 8 << 20  # bytes; notices of many components are long, and must travel whole
_MAX_FILES = 20  # licence files that are read in one directory, and licences that one card may name
_MAX_LISTED = 1000
_UNREAD_CARD = {"license": "front matter that cannot be read"}
# LICENSE, LICENCE.txt, COPYING, UNLICENSE; and with a word before it, LLAMA_LICENSE.txt, MODEL-LICENSE, if it is a text
_LICENSE_FILE = re.compile(
    r"^(?:(?:un)?licen[cs]e|copying)(?:[-_. ].*)?$|^.*[-_. ](?:licen[cs]e|copying)(?:[-_ ].*)?(?:\.(?:txt|md|rst))?$",
    re.IGNORECASE,
)
_NOTICE_FILE = re.compile(r"^notices?(?:\.(?:txt|md|rst))?$", re.IGNORECASE)
_CARD_FILE = re.compile(r"^readme\.md$", re.IGNORECASE)
_OTHERS = re.compile("|".join(map(re.escape, ("lineage.json", "adapter_config.json", *MERGE_FILES))), re.IGNORECASE)
_TIMEOUT = 5.0  # seconds; a gate must not hang
_MAX_BYTES = 1 << 20


def speaks_of_terms(name: str) -> bool:
    """Whether a file of a hub repository, by its name, speaks of the repository's terms."""
    return bool(_OTHERS.fullmatch(name) or any(p.match(name) for p in (_CARD_FILE, _NOTICE_FILE, _LICENSE_FILE)))


@dataclass(frozen=True)
class DirectoryFacts:
    """What a directory says.

    Attributes:
        readings: licences, each with the file that names it.
        text_sha256: digest of the licence texts found.
        copyright: copyright lines of those texts.
        notice: contents of its NOTICE files.
        unmatched_text: a licence text that no registry entry matches.
        bases: models that it was made from, with the kind of edge.
        writers: models that fields of a dataset's card name as its writers, each with the words that name it.
        prose: sentences of the card that name a model of a closed API, whatever they say of it.
        trace: the file that shows that a lineage record was here and is not any more.
    """

    readings: tuple[Evidence, ...] = ()
    text_sha256: str | None = None
    copyright: tuple[str, ...] = ()
    notice: str | None = None
    unmatched_text: str | None = None
    bases: Bases = ()
    writers: tuple[tuple[str, str], ...] = ()
    prose: tuple[str, ...] = ()
    trace: str | None = None


def read_directory(directory: Path, registry: Registry) -> DirectoryFacts:
    """Read licence files, NOTICE, the card, the licence in a config, an adapter's base and a dataset's writers.

    Raises:
        LineageError: ``adapter_config.json`` is not valid JSON.
    """
    readings: list[Evidence] = []
    copyrights: list[str] = []
    texts: list[str] = []
    unmatched: list[str] = []
    names = sorted(path for path in directory.iterdir() if not path.is_dir())
    linked: dict[str, str] = {}
    for path in [path for path in names if _LICENSE_FILE.match(path.name)][:_MAX_FILES]:
        text = _read_text(path, directory)
        if text is None:
            readings.append(Evidence(printable(path.name), "a file that is too large or leads elsewhere", (UNKNOWN,)))
            continue
        found = recognise(text, registry)
        readings.append(Evidence(printable(path.name), printable(found.says), (found.id or UNKNOWN,)))
        copyrights += copyright_lines(text)
        texts.append(text)
        if found.id is None:
            unmatched.append(text)
        else:
            linked[path.name] = found.id
    # The hub shows README.md; a card that is written otherwise is read as well
    card_files = sorted((path for path in names if _CARD_FILE.match(path.name)), key=lambda p: p.name != "README.md")
    card_texts = [_card_text(path, directory) for path in card_files[:_MAX_FILES]] or [""]
    card_text = card_texts[0]
    card = _front_matter(card_text)
    for other in card_texts:
        readings += _card_readings(_front_matter(other), registry, linked)
    readings += _config_readings(directory, registry)
    merges = {name: _read_text(directory / name, directory) for name in MERGE_FILES if (directory / name).exists()}
    bases, unread = bases_of(card, _read_text(directory / "adapter_config.json", directory), merges, directory.name)
    readings += unread
    notices: list[str] = []
    for path in [path for path in names if _NOTICE_FILE.match(path.name)][:_MAX_FILES]:
        text = _read_text(path, directory, _MAX_NOTICE)
        if text is None:
            readings.append(Evidence(printable(path.name), "a file that is too large or leads elsewhere", (UNKNOWN,)))
        elif text.strip():
            notices.append(text)
    return DirectoryFacts(
        readings=tuple(readings),
        text_sha256=sha256_text("\n".join(texts)) if texts else None,
        copyright=tuple(dict.fromkeys(copyrights)),
        notice="\n\n".join(dict.fromkeys(notices)) or None,
        unmatched_text="\n\n".join(unmatched) or None,
        bases=bases,
        writers=writers_of(card, registry),
        prose=prose_of(card_text, registry),
        trace=traces_in(directory, card, card_text),
    )


def _card_text(path: Path, directory: Path) -> str:
    """Return the beginning of a card; one that leads elsewhere reads as one that cannot be read."""
    if path.is_symlink() and not _stays_home(path, directory):
        return "---\n"
    with path.open("rb") as file:
        raw = file.read(_MAX_TEXT)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, in which no front matter would be found
        return "---\n"
    return raw.decode("utf-8", "replace")


def _front_matter(text: str) -> Mapping[str, Any]:
    """Return the YAML front matter of a card.

    Front matter that cannot be read says that it cannot be read: it then resolves to unknown, not to nothing.
    """
    front = front_of(text)
    if front is None:
        return _UNREAD_CARD if has_begun(text) else {}
    try:
        data = parse_yaml(front.encode("utf-8", "replace"), "README.md")
    except ConfigError:
        return _UNREAD_CARD
    if data is None:  # blank lines and comments
        return {}
    return data if isinstance(data, Mapping) else _UNREAD_CARD


def _card_readings(card: Mapping[str, Any], registry: Registry, linked: Mapping[str, str]) -> list[Evidence]:
    """Read the licences of a card; ``linked`` has the files of the directory whose texts were recognised."""
    written = [value for key, value in card.items() if str(key).strip().lower() in ("license", "licence")]
    listed = [one for value in written for one in (value if isinstance(value, list) else [value])]
    readings = []
    for one in listed[:_MAX_LISTED]:
        if one is None or (one == "license" and "licence" in card):  # TRL 1.16 writes "licence: license"
            continue
        # "other" is something only with both a name and a link
        name = card.get("license_name") if str(one).lower() == "other" and card.get("license_link") else None
        value = printable(str(name if isinstance(name, str) else one), 100)
        reading = read_licence("README.md", value, "stranger", registry)
        link = str(card.get("license_link") or "").strip().split("#")[0].split("?")[0].rstrip("/").rsplit("/", 1)[-1]
        if UNKNOWN in reading.ids and isinstance(name, str) and link in linked:
            # A name that nobody knows, for a text that is here and was read: the text says which licence it is
            reading = Evidence("README.md", f"{value}, whose text is {link}", (linked[link],), "stranger")
        readings.append(reading)
    found = list(dict.fromkeys(readings))
    if len(found) > _MAX_FILES:
        return [Evidence("README.md", f"{len(found)} licences, more than a card can mean", (UNKNOWN,))]
    return found


def _config_readings(directory: Path, registry: Registry) -> list[Evidence]:
    """Read the licence that a model's config or a saved dataset's description names, if any."""
    readings = []
    for name in ("config.json", "dataset_info.json"):
        text = _read_text(directory / name, directory)
        try:
            data = json.loads(text or "{}")
        except (ValueError, RecursionError):
            continue  # whoever loads it will say so
        written = data.get("license") if isinstance(data, Mapping) else None
        if isinstance(written, str) and written.strip():
            readings.append(read_licence(name, written, "stranger", registry, 100))
    return readings


def _read_text(path: Path, inside: Path, limit: int = _MAX_TEXT) -> str | None:
    """Read a text of at most ``limit`` bytes, or None where there is none: nobody's licence is longer than 1 MiB."""
    if not path.is_file():
        return None
    if path.is_symlink() and not _stays_home(path, inside):
        return None
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    return None if len(raw) > limit else raw.decode("utf-8", "replace")


def _stays_home(path: Path, directory: Path) -> bool:
    home = directory.resolve()
    if home.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/COMMIT -> ../../blobs
        home = home.parent.parent
    return path.resolve().is_relative_to(home)


@dataclass(frozen=True)
class HubAnswer:
    """The hub's files of a repository that speak of its terms.

    Attributes:
        directory: the snapshot in the hub's local cache, or None.
        problem: why there is nothing, in words; None where there is something.
        weights: sha256 of the large files that the hub holds, by name.
    """

    directory: Path | None = None
    problem: str | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


class _Reach:
    """Whether the hub answered in this process; after one failed connection it is not asked again."""

    problem: str | None = None


def ask_hub(repo: str, revision: str | None, kind: Literal["model", "dataset"]) -> HubAnswer:
    """Bring card, licence texts and NOTICE of a repository into the hub's local cache; never its weights.

    Args:
        repo: hub id.
        revision: branch, tag or commit; None is the default branch.
        kind: kind of repository.
    """
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return HubAnswer(problem="not asked: HF_HUB_OFFLINE is set")
    if _Reach.problem is not None:
        return HubAnswer(problem=_Reach.problem)
    try:
        info = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=_TIMEOUT, files_metadata=True)
        places = [
            Path(hf_hub_download(repo, file.rfilename, revision=info.sha, repo_type=kind))
            for file in getattr(info, "siblings", None) or []
            if speaks_of_terms(file.rfilename) and (file.size or 0) <= _MAX_BYTES
        ]
    except HfHubHTTPError as error:
        return HubAnswer(problem=printable(f"no answer for this repository: {type(error).__name__}"))
    except Exception as error:
        # Proxies, certificates, name resolution, two generations of HTTP clients: whatever it was, the gate goes
        # on without the hub, and the record says so.
        _Reach.problem = printable(f"could not be reached: {type(error).__name__}")
        return HubAnswer(problem=_Reach.problem)
    if not places:
        return HubAnswer(problem="the repository has neither card nor licence file")
    return HubAnswer(directory=places[0].parent, weights=_digests(info))


def _digests(info: Any) -> dict[str, str]:
    large = {file.rfilename: getattr(file, "lfs", None) for file in getattr(info, "siblings", None) or []}
    digests = {str(name): getattr(lfs, "sha256", None) for name, lfs in large.items()}
    return {name: str(digest) for name, digest in digests.items() if digest}
