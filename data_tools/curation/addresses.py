"""The addresses of documents: what two of them have in common although they are written differently."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import urlsplit

import xxhash


def address_hashes(url: str) -> tuple[int, int]:
    """Hashes of an address without what does not count, and of its registered domain; 0 where it is not one."""
    address, domain = same_address(url), _domain(url)
    return (_hash(address) if address else 0), (_hash(domain) if domain else 0)


def same_address(url: str) -> str:
    """The address without scheme, user, port, `www.`, tracking parameters, fragment and last slash; "" for none."""
    from courlan import normalize_url

    try:
        parts = urlsplit(normalize_url(url))
        host = (parts.hostname or "").removeprefix("www.")
    except ValueError:
        return ""
    if not host:
        return ""
    return f"{host}{parts.path.rstrip('/')}" + (f"?{parts.query}" if parts.query else "")


def _domain(url: str) -> str:
    try:
        return _registered(urlsplit(url).hostname or "")
    except ValueError:
        return ""


@lru_cache(maxsize=1 << 14)
def _registered(host: str) -> str:
    """The domain that someone registered: `example.co.uk` of `news.example.co.uk`."""
    from courlan import extract_domain

    return extract_domain(f"http://{host}/") or host


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace")) | 1  # never 0
