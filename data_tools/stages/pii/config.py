"""The options of the stage, apart from its patterns, which take long to compile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class PiiConfig:
    """Which kinds of personal data and secrets are replaced in the text. No document is dropped."""

    email: bool = True
    """Replace email addresses, `name [at] host (dot) com` included; not those at names reserved for examples and at
    hosts of a local network."""
    ip: bool = True
    """Replace IPv4 and IPv6 addresses of the public internet."""
    private_ip: bool = False
    """With `ip`, replace private and link-local addresses too. Those for documentation and 0.0.0.0/8 always stay."""
    phone: bool = True
    """Replace phone numbers that are valid in their country: written as such, or after a word such as tel or 手机.
    Toll-free ones stay. In code, only those near such a word are replaced."""
    id_number: bool = True
    """Replace Chinese resident identity numbers: with a valid checksum (GB 11643-1999), or old ones after 身份证."""
    national_id: bool = False
    """Replace identity, social security and tax numbers of other countries, and passport numbers, after their names."""
    iban: bool = False
    """Replace bank account numbers (IBAN) with valid check digits."""
    bank_card: bool = True
    """Replace card numbers of known issuers with a valid checksum (ISO/IEC 7812-1)."""
    secret: bool = True
    """Replace private keys, the keys and tokens of some ninety services, and passwords and keys that are given to
    a name such as `api_key` or stand where only secrets do."""
    salt: str = ""
    """Changes the placeholder of every value; use the same salt wherever results must agree."""
