"""Which servers are the user's own: judged by the licence of the weights that they declare, and by nobody's terms."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

# Names that no public resolver answers for: reserved, or used inside one network only.
_PRIVATE_NAMES = frozenset(
    "localhost local internal lan home arpa intranet private corp test svc cluster localdomain".split()  # noqa: SIM905
)
_BARE_NAME = re.compile(r"[a-z_][a-z0-9_-]*")  # no digit in front: 0x7f000001 and 2130706433 are addresses


def host_of(endpoint: str) -> str | None:
    """Return the host of a URL or of ``host:port`` in lower case, or None where there is none.

    Only the host is kept of an endpoint: a URL may hold credentials.
    """
    try:
        host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname
    except ValueError:  # brackets that hold no address
        return None
    return (host or "").rstrip(".").lower() or None


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
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_global
