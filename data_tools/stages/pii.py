"""Replaces personal data and secrets by placeholders that depend only on the replaced value.

Each finder first looks for a cheap sign (an @, a run of digits) and runs its patterns only near it. A placeholder never
counts as personal data itself, so that a second run changes nothing: it comes from ranges reserved for examples (RFC
2606, 3849, 5737; 555-01xx of the North American plan) or is not a valid number.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

from data_tools.record import Record


@dataclass(kw_only=True, slots=True)
class PiiConfig:
    """Which kinds of personal data and secrets are replaced in the text. No document is dropped."""

    email: bool = True
    """Replace email addresses, except those at names reserved for examples and at hosts of a local network."""
    ip: bool = True
    """Replace IPv4 and IPv6 addresses of the public internet."""
    private_ip: bool = False
    """With `ip`, replace private and link-local addresses too. Those for documentation and 0.0.0.0/8 always stay."""
    phone: bool = True
    """Replace phone numbers: international with +, North American, Chinese mobile and landline; not toll-free ones."""
    id_number: bool = True
    """Replace Chinese resident identity numbers with a valid checksum (GB 11643-1999)."""
    bank_card: bool = True
    """Replace card numbers of known issuers with a valid checksum (ISO/IEC 7812-1)."""
    secret: bool = True
    """Replace keys and tokens: AWS, GitHub, Slack, Google, OpenAI and similar, JWT, private keys, `api_key = "..."`."""
    salt: str = ""
    """Changes the placeholder of every value; use the same salt wherever results must agree."""


class PiiMatch(NamedTuple):
    """A piece of text to be replaced."""

    start: int
    end: int
    kind: str
    form: str
    """The kind of placeholder that fits."""
    value: str
    """The number or address in one form, the same for all of its spellings."""


class PiiStage:
    """Replaces personal data and secrets, and counts them as `pii.<kind>`. Never drops a document."""

    name = "pii"

    def __init__(self, config: PiiConfig) -> None:
        self._salt = config.salt.encode()
        self._private_ip = config.private_ip
        kinds = ("secret", "email", "ip", "id_number", "bank_card", "phone")
        self._kinds = {kind for kind in kinds if getattr(config, kind)}

    def process(self, record: Record) -> str | None:
        # A placeholder can form a new candidate with the text beside it, which takes one more pass.
        for _ in range(_MAX_PASSES):
            found = self._find(record.text)
            if not found:
                return None
            pieces, at = [], 0
            for item in found:
                pieces += [record.text[at : item.start], placeholder(item.form, item.value, self._salt)]
                at = item.end
                record.count(f"pii.{item.kind}")
            record.text = "".join(pieces) + record.text[at:]
        return None

    def _find(self, text: str) -> list[PiiMatch]:
        """The pieces to replace, without overlaps: the leftmost piece wins, then the earlier finder."""
        text = _fold_width(text)
        candidates: list[PiiMatch] = []
        if "secret" in self._kinds:
            candidates += _find_secrets(text)
        if "email" in self._kinds:
            candidates += _find_emails(text)
        if "ip" in self._kinds:
            candidates += _find_ipv4(text, self._private_ip)
            candidates += _find_ipv6(text, self._private_ip)
        candidates += _find_numbers(text, self._kinds)
        candidates.sort(key=lambda item: item.start)
        found: list[PiiMatch] = []
        for item in candidates:
            if not found or item.start >= found[-1].end:
                found.append(item)
        return found


# --- placeholders ---

_MAX_PASSES = 8
_NAMES = (
    "alex anna ben carla chen daniel emma eric fang grace hannah ivan jack jing julia kate lee lena li maria "
    "mei michael nina oscar paul rosa sam sara tom wang wei zhang"
).split()


def placeholder(form: str, value: str, salt: bytes) -> str:
    """The placeholder of a value: the same for all of its spellings, on every machine and in any order."""
    digest = hashlib.blake2b(salt + b"\0" + value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    match form:
        case "email":
            return f"{_NAMES[number % 32]}@example.{('com', 'net', 'org')[number // 32 % 3]}"
        case "ipv4":
            return f"{('192.0.2', '198.51.100', '203.0.113')[number % 3]}.{1 + number // 3 % 254}"
        case "ipv6":
            return f"2001:db8::{1 + number % 0xFFFE:x}"
        case "mobile" | "mobile +86":
            return f"{'+86 ' if form == 'mobile +86' else ''}1380000{number % 10_000:04}"
        case "landline":  # no local number begins with 0
            return f"010-0000{number % 10_000:04}"
        case "north american" | "international":
            return f"{'+1 ' if form == 'international' else ''}202-555-01{number % 100:02}"
        case "id_number":  # as of a person born in 1800
            body = f"11010118000101{number % 1000:03}"
            return body + id_check_digit(body)
        case "bank_card":  # the number that card networks publish for tests
            return "4111 1111 1111 1111"
        case fixed:
            return fixed


# --- text ---

# The full-width dot is left out, because numbers with it are values in tables, never addresses.
_FULL_WIDTH = re.compile("[０-９＠＋－（）]")
_FOLD = {ord(wide): ord(wide) - 0xFEE0 for wide in "０１２３４５６７８９＠＋－（）"}


def _fold_width(text: str) -> str:
    """Replace full-width digits and signs by ASCII ones; every character keeps its position."""
    return text if text.isascii() or not _FULL_WIDTH.search(text) else text.translate(_FOLD)


# --- keys and tokens ---

# Each entry has a string that the text must contain, the pattern, and the placeholder.
_KEYS = (
    (("AKIA", "ASIA"), r"A[KS]IA[A-Z2-7]{16}(?![A-Za-z0-9])", "YOUR_AWS_ACCESS_KEY"),
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_[A-Za-z0-9]{36,251}", "YOUR_GITHUB_TOKEN"),
    (("github_pat_",), r"github_pat_[A-Za-z0-9_]{40,255}", "YOUR_GITHUB_TOKEN"),
    (("xox",), r"xox[abeoprs]-[A-Za-z0-9-]{20,250}", "YOUR_SLACK_TOKEN"),
    (("AIza",), r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", "YOUR_GOOGLE_API_KEY"),
    (("sk-",), r"sk-[A-Za-z0-9_-]{20,250}", "YOUR_API_KEY"),
    (("eyJ",), r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}", "YOUR_JSON_WEB_TOKEN"),
)
_KEYS = tuple((needed, re.compile(r"(?<![A-Za-z0-9_-])" + pattern), form) for needed, pattern, form in _KEYS)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,24}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:((?:(?!-----).){1,20000})-----END [A-Z ]{0,24}PRIVATE KEY(?: BLOCK)?-----|((?:\s*[A-Za-z0-9+/=]{32,80})+))",
    re.DOTALL,
)
_ASSIGNED = re.compile(
    r"[=:](?:\s{0,3}([\"'])([A-Za-z0-9+/_=.~-]{16,128})\1|(?<==)([A-Za-z0-9+/_=.~-]{20,128})(?=[\s&]|\Z))"
)
_KEY_NAME = re.compile(
    r"(?:api_?-?key|access_?-?key|secret|token|passw(?:or)?d|credential)[A-Za-z0-9_-]{0,16}[\"'\]]{0,2}\s{0,3}\Z",
    re.IGNORECASE,
)


def _find_secrets(text: str) -> Iterator[PiiMatch]:
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            group = 1 if match[1] else 2
            if re.search(r"[A-Za-z0-9+/=]{40}", match[group]):
                yield PiiMatch(*match.span(group), "secret", "\nYOUR_PRIVATE_KEY\n", "")
    for literals, pattern, form in _KEYS:
        if any(literal in text for literal in literals):
            for match in pattern.finditer(text):
                if _is_random(match[0]) and "EXAMPLE" not in match[0]:
                    yield PiiMatch(*match.span(), "secret", form, "")
    for match in _ASSIGNED.finditer(text):
        group = 2 if match[2] else 3
        if _is_random(match[group]) and _KEY_NAME.search(text, max(0, match.start() - 48), match.start()):
            yield PiiMatch(*match.span(group), "secret", "YOUR_SECRET", "")


def _is_random(value: str) -> bool:
    """Whether letters and digits are mixed, with at least 3 bits per character: not a word, a name or `xxxxxxxx`."""
    counts = Counter(re.sub(r"[-_.~]", "", value))
    total = sum(counts.values())
    if sum(counts[digit] for digit in "0123456789") < 3 or value.isdigit():
        return False
    return -sum(n / total * math.log2(n / total) for n in counts.values()) >= 3


# --- email ---

_AT_DOMAIN = re.compile(r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}([A-Za-z]{2,24}))(?![A-Za-z0-9_(@-])")
_LOCAL_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?\Z")
_NO_TOP_LEVEL = frozenset(
    "png jpg jpeg gif svg webp css js ts py html json tgz zip gz whl git jar so dll "  # files: icon@2x.png
    "test example invalid localhost local lan internal".split()  # RFC 2606, RFC 6762 and habit
)


_EXAMPLES = ("example.com", "example.net", "example.org")


def _find_emails(text: str) -> Iterator[PiiMatch]:
    if "@" not in text:
        return
    for match in _AT_DOMAIN.finditer(text):
        at = match.start()
        local = _LOCAL_PART.search(text, max(0, at - 64), at)
        domain = match[1].lower()
        if not local or match[2].lower() in _NO_TOP_LEVEL or domain.endswith(_EXAMPLES):
            continue
        # git@host:path, https://user@host, a@b.shape
        if (
            local[0] == "git"
            or text.endswith("//", 0, local.start())
            or len(local[0]) + domain.find(".") <= 2
        ):
            continue
        yield PiiMatch(
            local.start(), match.end(), "email", "email", text[local.start() : match.end()].lower()
        )


# --- IP addresses ---

# The lookbehind follows the first character, so that the search can skip ahead to it.
_IPV4 = re.compile(
    r"[0-9](?<![0-9A-Za-z_.].)[0-9]{0,2}\.(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?![0-9A-Za-z_]|\.[0-9A-Za-z])"
)
_TWO_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6 = re.compile(r"[23fF](?<![0-9A-Za-z_:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{3,34}(?![0-9A-Za-z_:]|\.[0-9])")


# IANA special-purpose registries (RFC 6890), as of 2025. They are listed here because Python's own list changes with
# its version.
def _nets(nets: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(net) for net in nets.split()]


_NEVER_V4 = _nets("192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 0.0.0.0/8 224.0.0.0/3")
_PRIVATE_V4 = _nets(
    "10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.168.0.0/16 198.18.0.0/15"
)
_NEVER_V6 = _nets("2001:db8::/32 3fff::/20 2001::/23")
_PUBLIC_V6 = _nets("2000::/3")
_PRIVATE_V6 = _nets("fc00::/7 fe80::/10")
_NO_ADDRESS_BEFORE = re.compile(
    r"(?:\bversions?|\brelease|\bver\.?|\bv|版本|版|[A-Za-z][/-]|[=~<>!]=|\^"
    r"|\bsections?|\bsec\.|\bchapter|\bclause|\barticle|\bfigure|\bfig\.|\btable|\bappendix|§|第|条|章|节)\s*\Z",
    re.IGNORECASE,
)
_NETWORK_BEFORE = re.compile(
    r"(?:\bip\b|ipv4|address|host|server|\bdns\b|ping|gateway|proxy|地址|服务器|主机|://|@)[^\n]{0,16}\Z",
    re.IGNORECASE,
)


def _find_ipv4(text: str, private: bool) -> Iterator[PiiMatch]:
    for match in _IPV4.finditer(text):
        octets = match[0].split(".")
        if any(int(octet) > 255 or (octet[0] == "0" and len(octet) > 1) for octet in octets):
            continue
        address = ipaddress.IPv4Address(match[0])
        if any(address in net for net in _NEVER_V4 + ([] if private else _PRIVATE_V4)):
            continue
        before = text[max(0, match.start() - 32) : match.start()]
        if _NO_ADDRESS_BEFORE.search(before):
            continue
        # 4.1.2.3 is a heading or a version more often than a host, unless the text says so
        if max(map(int, octets)) < 32 and not _NETWORK_BEFORE.search(before):
            continue
        yield PiiMatch(match.start(), match.end(), "ip", "ipv4", match[0])


def _find_ipv6(text: str, private: bool) -> Iterator[PiiMatch]:
    for match in _IPV6.finditer(text) if _TWO_COLONS.search(text) else ():
        raw = match[0]
        if sum(map(bool, raw.split(":"))) < 3:  # a slice: x[2000::3]
            continue
        try:
            address = ipaddress.IPv6Address(raw)
        except ValueError:
            continue
        if any(address in net for net in _NEVER_V6):
            continue
        if any(address in net for net in _PUBLIC_V6 + (_PRIVATE_V6 if private else [])):
            yield PiiMatch(match.start(), match.end(), "ip", "ipv6", address.exploded)


# --- numbers: identity, cards, phones ---

# Seven or more digits with at most two signs between them. No number that is looked for below is shorter.
_CLUSTER = re.compile(r"[0-9](?:[ ().\-]{0,2}[0-9]){6,}")
_BEFORE = r"(?<![0-9A-Za-z_])(?<![0-9][.,\-])(?<![0-9] )"
_AFTER = r"(?![0-9A-Za-z_]|[.,\-][0-9]| [0-9])"
_ID = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.\-])"
    r"([1-8][0-9]{5})[ -]?((?:19|20)[0-9]{6})[ -]?([0-9]{3}[0-9Xx])(?![0-9A-Za-z_]|[.\-][0-9])"
)
_CARD = re.compile(
    _BEFORE + r"(?:[2-6][0-9]{12,18}"
    r"|[2-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{1,3})?"
    r"|3[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})" + _AFTER
)
# Visa, Mastercard, Mir, American Express, JCB, Diners Club, UnionPay and Discover, with their lengths.
_ISSUER = re.compile(
    "4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9].|[3-6]..|7[01].|720|20[0-4])[0-9]{12}"
    "|3[47][0-9]{13}|35(?:2[89]|[3-8].)[0-9]{12,15}|3(?:0[0-5]|[689].).[0-9]{10}|6(?:[25]..|011|4[4-9].)[0-9]{12,15}"
)
_MOBILE = re.compile(
    _BEFORE + r"((?:\+|00)86[- ]?|\(\+?86\) ?|86[- ])?(1[3-9][0-9]([ -]?)[0-9]{4}\3[0-9]{4})" + _AFTER
)
_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.,\- ])(?:(?:\+|00)86[- ]?\(?0?|\(0|0)"
    r"(10|2[0-9]|[3-9][0-9]{2})(\) ?|\)?-| ?)([2-8][0-9]{6,7}|[2-8][0-9]{2,3}[ -][0-9]{4})"
    r"(?:(?:-|转)[0-9]{1,5})?" + _AFTER
)
_PHONE_BEFORE = re.compile(
    r"(?:电话|電話|传真|傳真|热线|熱線|手机|手機|tel|phone|fax|call)[^0-9\n]{0,8}\Z", re.IGNORECASE
)
_NORTH_AMERICAN = re.compile(
    r"(?<![0-9A-Za-z_+(])(?<![0-9][.,\-])(?:\+?1[-. ]?)?"
    r"(?:\(([2-9][0-9]{2})\)[ -]?|([2-9][0-9]{2})([-. ]))([2-9][0-9]{2})[-. ]([0-9]{4})" + _AFTER
)
_OPERATOR_BEFORE = re.compile(r"[=!<>]=\s?\Z|[+*%^]\s?\Z|\s-\s\Z")
_OPERATOR_AFTER = re.compile(r"\s?[*+%^]")
_INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z_+)\]])\+([1-9][0-9]{0,3})((?:[ -]?\(0\))?(?:[ -]?\(?[0-9]{1,5}\)?){2,6}|[0-9]{7,12})"
    + _AFTER
)
# Calling codes of ITU-T E.164 (list of 2016), which have one, two or three digits.
_CALLING_CODE = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-69][0-9]|3[578][0-9]|42[013]|5[09][0-9]|6[789][0-9]|8[0578][0-9]|9[679][0-9]"
)
_TOLL_FREE = frozenset("400 800 833 844 855 866 877 888".split())
_PROVINCES = frozenset(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83".split()
)


def _find_numbers(text: str, kinds: set[str]) -> Iterator[PiiMatch]:
    for cluster in _CLUSTER.finditer(text):
        start, end = max(0, cluster.start() - 3), min(len(text), cluster.end() + 8)
        for kind, pattern, check in _NUMBER_RULES:
            if kind not in kinds:
                continue
            for match in pattern.finditer(text, start, end):
                taken = check(match) if match.start() < cluster.end() else None
                if taken:
                    yield PiiMatch(match.start(), match.end(), kind, *taken)


def id_check_digit(body: str) -> str:
    """The 18th character for the first 17 digits (GB 11643-1999, ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - at, 11) for at, digit in enumerate(body))
    return "10X98765432"[total % 11]


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it (ISO/IEC 7812-1, annex B)."""
    doubled = "0246813579"
    return (sum(map(int, digits[-1::-2])) + sum(int(doubled[int(d)]) for d in digits[-2::-2])) % 10 == 0


def _check_id(match: re.Match[str]) -> tuple[str, str] | None:
    region, born, tail = match.groups()
    value = (region + born + tail).upper()
    try:
        date(int(born[:4]), int(born[4:6]), int(born[6:]))
    except ValueError:
        return None
    if region[:2] not in _PROVINCES or int(born[:4]) > 2050 or id_check_digit(value[:17]) != value[17]:
        return None
    return "id_number", value


def _check_card(match: re.Match[str]) -> tuple[str, str] | None:
    digits = re.sub("[ -]", "", match[0])
    # fewer than four different digits: round numbers, and the test number 4111 1111 1111 1111
    if len(set(digits)) < 4 or not _ISSUER.fullmatch(digits) or not luhn(digits):
        return None
    return "bank_card", digits


def _is_placeholder(digits: str) -> bool:
    return digits[-11:-4] == "1380000" or (len(digits) >= 10 and digits[-7:-2] == "55501")


def _check_mobile(match: re.Match[str]) -> tuple[str, str] | None:
    digits = re.sub("[ -]", "", match[2])
    if _is_placeholder(digits) or len(set(digits)) < 3:
        return None
    around = (
        match.string[max(0, match.start() - 3) : match.start()],
        match.string[match.end() : match.end() + 2],
    )
    if match[0] == digits and (_OPERATOR_BEFORE.search(around[0]) or _OPERATOR_AFTER.match(around[1])):
        return None
    return ("mobile +86" if match[1] else "mobile"), digits


def _check_landline(match: re.Match[str]) -> tuple[str, str] | None:
    before = match.string[max(0, match.start() - 12) : match.start()]
    if not match[2].strip() and "86" not in match[0][:5] and not _PHONE_BEFORE.search(before):
        return None
    return "landline", match[1] + re.sub("[ -]", "", match[3])


def _check_north_american(match: re.Match[str]) -> tuple[str, str] | None:
    area, exchange, line = match[1] or match[2], match[4], match[5]
    if area in _TOLL_FREE or area.endswith("11") or exchange.endswith("11"):
        return None
    if exchange == "555" and line.startswith("01"):
        return None
    if match[3] == " ":  # columns of numbers look the same
        before = match.string[max(0, match.start() - 16) : match.start()]
        if not match[0].startswith(("+", "1 ")) and not _PHONE_BEFORE.search(before):
            return None
    return "north american", area + exchange + line


def _check_international(match: re.Match[str]) -> tuple[str, str] | None:
    digits = re.sub("[^0-9]", "", match[0])
    if not 9 <= len(digits) <= 15 or len(set(digits)) < 4 or not _CALLING_CODE.match(digits):
        return None
    if _is_placeholder(digits) or (digits[0] == "1" and (len(digits) != 11 or digits[1:4] in _TOLL_FREE)):
        return None
    return "international", digits


_NUMBER_RULES = (
    ("id_number", _ID, _check_id),
    ("bank_card", _CARD, _check_card),
    ("phone", _MOBILE, _check_mobile),
    ("phone", _LANDLINE, _check_landline),
    ("phone", _NORTH_AMERICAN, _check_north_american),
    ("phone", _INTERNATIONAL, _check_international),
)
