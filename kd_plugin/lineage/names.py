"""Names as people, gateways, cards and addresses write them: one form of each, and what a name tells by itself.

The name of a model tells its organisation and its parts; an address tells its host, and whether that is on the user's
own network. Nothing is looked up.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

# Letters of other scripts that look like Latin ones; NFKC leaves them apart
_LOOKALIKES = str.maketrans("асԁеһіјӏорԛѕтухѡԝɡοαρν", "acdehijlopqstuxwwgoapv")
_HYPHENS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\ufe58\ufe63\uff0d\u00ad"
# Who serves or resells closed models puts a name of this kind before the model's own
_VENDORS = ("openai", "anthropic", "google", "xai", "x-ai", "azure", "amazon", "aws", "bedrock", "vertex-ai", "vertex")
_VENDOR = re.compile(rf"^(?:[a-z]{{2,7}}\.)?(?:{'|'.join(map(re.escape, _VENDORS))})[.-]+(?=.)")
# Names that no public resolver answers for: reserved, or used inside one network only.
_PRIVATE_NAMES = frozenset(
    "localhost local internal lan home arpa intranet private corp test svc cluster localdomain".split()  # noqa: SIM905
)
# Machines that people rent and name by the provider's domain: not the provider's own services.
_RENTED = ("compute.amazonaws.com", "compute-1.amazonaws.com", "elb.amazonaws.com", "cloudapp.azure.com")
_BARE_NAME = re.compile(r"[a-z_][a-z0-9_-]*")  # no digit in front: 0x7f000001 and 2130706433 are addresses
_SCHEME = re.compile(r"(?:(?:https?|wss?|grpcs?)://|//)", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")
# What names of weights hold, and names of models behind an API do not: a size, a format, or another family
_WEIGHTS = re.compile(
    r"(?:^|[-.])(?:\d+(?:\.\d+)?[bm]|gguf|gptq|awq|exl[23]|mlx|bnb|fp8|int[48]|[48]bit|hf|q?lora|distil(?:l|led)?|"
    r"llama|qwen|mistral|mixtral|phi|gemma|vicuna|alpaca|falcon|pythia|bert|t5)(?:$|[-.\d])"
)
_MAX_NAME, _MAX_PARTS = 500, 16  # characters and parts of a name that are looked at


def normalized(name: str) -> str:
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
    *path, last = normalized(name.strip().removesuffix(":latest")).split("/")
    parts = [part for piece in reversed(re.split(r"[:@]", last)) if (part := piece.strip("-. "))]
    return (path[-1] if path else ""), parts


def without_vendor(part: str) -> str:
    """Return a model's own name without the vendor that stands before it: ``OpenAI GPT-4o``."""
    return _VENDOR.sub("", part)


def is_vendor(organisation: str) -> bool:
    """Whether an organisation serves or resells closed models, so that what it names is its own."""
    return without_vendor(f"{organisation}-x") == "x"


@dataclass(frozen=True)
class ServiceModels:
    """Which names of models only a service offers.

    Attributes:
        whole: regular expression of a whole model name, normalized, to service id.
        closed: regular expression of how the names of a closed family begin, normalized, to service id.
        open: regular expressions of how names begin that belong to no closed family although they look like it; with
            the organisation before them where only its own are meant.
    """

    whole: Mapping[str, str]
    closed: Mapping[str, str]
    open: tuple[str, ...]

    def offering(self, name: str) -> str | None:
        """Return the service that alone offers the model of this name, or None.

        Families are matched by how their names begin, and open ones are excepted by name. A hub id of somebody else
        than a vendor may begin so too: it counts unless it says that it is weights of another kind (a size, a format,
        the base that it was made from).
        """
        organisation, parts = model_parts(name[:_MAX_NAME])
        for part in parts[:_MAX_PARTS]:
            own = without_vendor(part)
            if any(self._opens.match(text) for text in (part, own, f"{organisation}/{part}")):
                continue
            found = self._wholes.fullmatch(own)
            if found is None and not (organisation and not is_vendor(organisation) and _WEIGHTS.search(own)):
                found = self._closes.match(own)
            if found is not None:
                return self._service(found)
        for part in normalized(name[:_MAX_NAME]).split("/")[:-1][-_MAX_PARTS:]:  # gateways may go on behind the name
            found = self._wholes.fullmatch(without_vendor(part))
            if found is not None:
                return self._service(found)
        return None

    @cached_property
    def _opens(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.open) or r"(?!)")

    @cached_property
    def _wholes(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?P<m{n}>{pattern})" for n, pattern in enumerate(self.whole)) or r"(?!)")

    @cached_property
    def _closes(self) -> re.Pattern[str]:
        patterns = "|".join(f"(?P<c{n}>{pattern})" for n, pattern in enumerate(self.closed)) or r"(?!)"
        return re.compile(rf"(?:{patterns})(?![a-z])")

    def _service(self, found: re.Match[str]) -> str:
        """Return the service of the pattern that matched, by the name of its group."""
        group = next(name for name, value in found.groupdict().items() if value is not None)
        return list((self.whole if group[0] == "m" else self.closed).values())[int(group[1:])]


def host_of(endpoint: str) -> str | None:
    """Return the host of a URL or of ``host:port`` in lower case, or None where it cannot be told for certain.

    Only the host is kept of an endpoint: a URL may hold credentials. An address that two programs could read as two
    hosts has none here: a scheme without slashes, backslashes, blanks, percent signs in the host.
    """
    text = endpoint.strip()
    if not text or "\\" in text or any(c.isspace() or not c.isprintable() for c in text):
        return None
    begins = _SCHEME.match(text)
    if begins is None and not re.match(r"[^/?#@:]+(?::\d+)?(?:[/?#]|$)|\[[^]]+\](?::\d+)?(?:[/?#]|$)", text):
        return None
    try:
        parts = urlsplit(text if begins else f"//{text}")
        host, _ = parts.hostname, parts.port
    except ValueError:  # brackets that hold no address, a port that is no number
        return None
    return _canonical(host or "")


def _canonical(host: str) -> str | None:
    """Return a host as name servers see it: lower case, one form of each letter, no dot at its end."""
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        pass
    try:
        name = unicodedata.normalize("NFKC", host).encode("idna").decode().lower().rstrip(".")
    except UnicodeError:  # empty labels, or labels that are too long
        return None
    return name if _HOST.fullmatch(name) and ".." not in name else None


def is_under(host: str, domain: str) -> bool:
    """Whether ``host`` is ``domain`` or a name below it; rented machines are not the provider's."""
    inside = host == domain or host.endswith(f".{domain}")
    return inside and not any(host.endswith(f".{rented}") for rented in _RENTED if rented != domain)


def mentions(endpoint: str, domain: str) -> bool:
    """Whether a domain stands anywhere in an address that could not be read."""
    text = unicodedata.normalize("NFKC", endpoint).lower()
    return re.search(rf"(?<![a-z0-9-]){re.escape(domain.lstrip('*.'))}(?![a-z0-9-])", text) is not None


def is_own_network(host: str) -> bool:
    """Whether a host is on the user's own network by its name or address alone; nothing is looked up.

    Args:
        host: name or address, in lower case.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if _BARE_NAME.fullmatch(host):
            return True
        last = host.removesuffix(".cluster.local").rsplit(".", 1)[-1]
        return last in _PRIVATE_NAMES and (last != "arpa" or host.endswith("home.arpa"))
    inside = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    teredo = getattr(address, "teredo", None)
    return not (inside or (teredo[1] if teredo else address)).is_global


def fits_host(host: str, pattern: str) -> bool:
    """Whether a host is, or lies under, the domain that a pattern names; ``*`` and its like stand as written."""
    return fnmatch.fnmatchcase(host, pattern) if "*" in pattern else is_under(host, pattern)


def names_a_host(pattern: str) -> bool:
    """Whether a pattern names a host, and not every one."""
    return sum(bool(label.strip("*?")) for label in pattern.split(".")) >= 2
