"""Which servers are the user's own: judged by the licence of the weights that they declare, and by nobody's terms."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from urllib.parse import urlsplit

# Names that no public resolver answers for: reserved, or used inside one network only.
_PRIVATE_NAMES = frozenset(
    "localhost local internal lan home arpa intranet private corp test svc cluster localdomain".split()  # noqa: SIM905
)
# Machines that people rent and name by the provider's domain: not the provider's own services.
_RENTED = ("compute.amazonaws.com", "compute-1.amazonaws.com", "elb.amazonaws.com", "cloudapp.azure.com")
_BARE_NAME = re.compile(r"[a-z_][a-z0-9_-]*")  # no digit in front: 0x7f000001 and 2130706433 are addresses
_SCHEME = re.compile(r"(?:(?:https?|wss?|grpcs?)://|//)", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")


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
