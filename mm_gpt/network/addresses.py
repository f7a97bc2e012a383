"""Which addresses belong to the public internet, and which hosts a URL may name.

A URL from a document or a chat must not reach into the network that the program runs in (SSRF): cloud metadata at
169.254.169.254, databases, the router. Checking the URL's text is not enough, since any name can resolve to any
address, and to another one a second later: `client` connects to the very address that was checked.
"""

import ipaddress
import re
from urllib.parse import SplitResult

from mm_gpt.errors import URLError

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# What `is_global` of Python 3.11 still lets through. Tunnels (2001::/23 has Teredo, 2002::/16 is 6to4) lead to an IPv4
# address inside; no public website resolves to one.
_NOT_PUBLIC_V6 = [ipaddress.IPv6Network(n) for n in ("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20")]
_NOT_PUBLIC_V4 = [
    ipaddress.IPv4Network(n)
    for n in (
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's metadata service, on an address that looks public
    )
]


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Not public: private, loopback, link-local, carrier-grade NAT, multicast, reserved and unspecified addresses, IPv6
    spellings of IPv4 (mapped, compatible), 6to4 and Teredo. NAT64 (64:ff9b::/96) is how IPv6-only networks reach IPv4
    sites, so there the address inside is judged.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public_address(str(ipaddress.IPv4Address(ip.packed[-4:])))
        return ip in _IPV6_GLOBAL_UNICAST and ip.is_global and not any(ip in network for network in _NOT_PUBLIC_V6)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC_V4)


def checked_host(parts: SplitResult) -> tuple[str, int]:
    """Host (in ASCII) and port of an http(s) URL. Raises URLError, or ValueError, with the reason only."""
    if parts.scheme not in ("http", "https"):
        raise URLError(f"only http and https are fetched, not {parts.scheme or 'a URL without scheme'}")
    if "@" in parts.netloc:
        raise URLError("user names and passwords in a URL are refused")
    host = parts.hostname or ""
    if ":" in host:
        ipaddress.IPv6Address(host)  # ValueError if it is none
        if "%" in host:
            raise URLError("an address with a zone is refused")
    else:
        host = host.encode("idna").decode("ascii")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
            raise URLError("the host name is malformed")
    return host, parts.port or (443 if parts.scheme == "https" else 80)
