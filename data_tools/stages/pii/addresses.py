"""Finds email and IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache

from data_tools.stages.pii.finding import PiiMatch, places, spans_around
from data_tools.stages.pii.top_levels import COUNTRIES, GENERIC

# --- email ---

_LETTERS = (
    "A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ"  # Latin, Greek and Cyrillic; Chinese stands beside an address without a blank
)
_LABEL = rf"[{_LETTERS}0-9](?:[{_LETTERS}0-9-]{{0,62}})"
_AT_DOMAIN = re.compile(
    rf"@((?:{_LABEL}\.){{1,8}}(xn--[a-z0-9-]{{2,24}}|[A-Za-z]{{2,24}}|[Ͱ-ϿЀ-ӿ]{{2,10}}))(?![{_LETTERS}0-9_(@]|-[{_LETTERS}0-9])"
    r"|@((?=[0-9A-Za-z-]{0,9}[\u4e00-\u9fff\u3040-\u30ff])[\u4e00-\u9fff\u3040-\u30ff0-9A-Za-z-]{1,30}\.(?:[A-Za-z]{2,3}\b|中国|中國|公司|网络|網絡|香港|台灣|台湾))"
)
_LOCAL_PART = re.compile(
    rf"(?:\b[DdOo]')?[{_LETTERS}0-9](?:[{_LETTERS}0-9._%+-]{{0,62}}[{_LETTERS}0-9_+-])?\Z"
)
_URL_BEFORE = re.compile(r"//(?:[^\s/@:]{0,64}:)?\Z")
_NAME_OF_ANY_SCRIPT = re.compile(r"[\u4e00-\u9fff\w](?:[\w.+-]{0,30}[\w])?\Z")
_EXAMPLES = frozenset(("example.com", "example.net", "example.org"))


def find_emails(text: str, is_code: bool) -> Iterator[PiiMatch]:
    """Email addresses, in the usual form and with the @ written in another way."""
    yield from _find_hidden_emails(text, is_code)
    if "@" not in text:
        return
    if "换成@" in text or "換成@" in text or "改" in text or "替换" in text:
        for match in _REPLACED_SIGN.finditer(text):
            value = f"{match[1]}@{match[3]}".lower()
            yield PiiMatch(match.start(), match.end(), "email", "email", value)
    for match in _AT_DOMAIN.finditer(text):
        at = match.start()
        local = (_NAME_OF_ANY_SCRIPT if match[3] else _LOCAL_PART).search(text, max(0, at - 64), at)
        domain = (match[1] or match[3]).lower()
        if not local or not _is_domain(domain):
            continue
        # git@host:path, https://user@host, ftp://user:password@host, a@b.shape
        if (
            local[0] == "git"
            or _URL_BEFORE.search(text, max(0, local.start() - 72), local.start())
            or len(local[0]) + domain.find(".") <= 2
        ):
            continue
        value = text[local.start() : match.end()].lower()
        yield PiiMatch(local.start(), match.end(), "email", "email", value)


def _is_domain(domain: str) -> bool:
    name, top = domain.rsplit(".", 1)
    if ".".join([name.rsplit(".", 1)[-1], top]) in _EXAMPLES:
        return False
    return top in COUNTRIES or top in GENERIC or not top.isascii() or top.startswith("xn--")


# `(at)`, `[@]`, `[dot]`, `&#64;` and `%40`; the others are looked for as they are.
_HIDDEN_SIGN = re.compile(
    r"[\[({<（&%](?: ?(?:at|AT|At|@|a|dot|DOT|Dot|\.|艾特|arroba) ?[\])}>）]|#0{0,3}64;|#[xX]0{0,2}40;|commat;|40)"
)
_SPOKEN_SIGNS = (
    ("AT", " AT "),
    ("_AT_", "_AT_"),
    ("_dot_", "_dot_"),
    ("dot", " dot "),
    ("dot", "-dot-"),
    ("@", " @ "),
)
"""Each with a part of it that most texts do not have."""
_BRACKETED_AT = (
    r"(?: {0,2}(?:[\[({<（] ?(?:[aA][tT]|@|a|艾特|arroba) ?[\])}>）]|&#0{0,3}64;|&#[xX]0{0,2}40;|&commat;) {0,2}"
    r"|%40|@|-at-|_AT_|_at_)"
)
_DOT = (
    r"(?:\.| {0,2}[\[({<（] ?(?:[dD][oO][tT]|\.|点) ?[\])}>）] {0,2}| (?:DOT|dot) |-dot-|_DOT_|_dot_"
    r"|&#0{0,3}46;|&#[xX]0{0,2}2[eE];|&period;)"
)
_HIDDEN, _SPOKEN = (
    re.compile(
        rf"(?<![A-Za-z0-9._%+-])([A-Za-z0-9_+-]{{1,40}}(?:{dot}[A-Za-z0-9_+-]{{1,40}}){{0,3}}){at}"
        rf"([A-Za-z0-9-]{{1,60}}(?:{_DOT}[A-Za-z0-9-]{{1,40}}){{0,3}}({_DOT})([A-Za-z]{{2,24}}))(?![A-Za-z0-9_(@-])"
    )
    for at, dot in (
        (f"({_BRACKETED_AT})", _DOT),
        ("( at (?=[A-Za-z0-9.-]{1,60} dot )| AT | @ )", r"(?:\.| (?:DOT|dot) )"),
    )
)
# Chinese writers put `name#host.com（#换成@）`, so that no program reads it.
_REPLACED_SIGN = re.compile(
    r"(?<![A-Za-z0-9._%+-])([A-Za-z0-9._+-]{1,40})([#*$&!^])((?:[A-Za-z0-9-]{1,40}\.){1,4}[A-Za-z]{2,24})"
    r"(?=[ ，,（(]{0,3}(?:请|請)?(?:把|将|將)?\2号?(?:换成|換成|改为|改為|改成|替换为|替换成|=)@)"
)
_MAIL_AFTER = re.compile(
    r" (?:is|was) (?:my|our|the|his|her|a) (?:new )?(?:e-?mail|mail|address)|\W{1,3}e?-?mail (?:me|us)\b",
    re.IGNORECASE,
)
_MAIL_BEFORE = re.compile(
    r"(?:mail|contact|reach|write|address|邮箱|郵箱|邮件|信箱)[^\n]{0,40}\Z", re.IGNORECASE
)


def _find_hidden_emails(text: str, is_code: bool) -> Iterator[PiiMatch]:
    signs = [match.start() for match in _HIDDEN_SIGN.finditer(text)]
    for part, sign in _SPOKEN_SIGNS:
        if part in text and sign in text and not (is_code and part == "@"):  # x @ y is a product
            signs = sorted([*signs, *places(text, sign)])
    if not signs:
        return
    for start, end in spans_around(signs, 130, 130):
        for match in _HIDDEN.finditer(text, start, min(len(text), end)):
            yield from _hidden_email(match)
        for match in _SPOKEN.finditer(text, start, min(len(text), end)):
            if _is_spoken(match):
                yield from _hidden_email(match)


def _hidden_email(match: re.Match[str]) -> Iterator[PiiMatch]:
    domain = re.sub(_DOT, ".", match[3]).lower()
    is_plain = match[2] in ("@", "-at-") and domain == match[3].lower()  # has rules of its own, or is none
    if not is_plain and _is_domain(domain) and not domain.startswith("www."):
        value = f"{re.sub(_DOT, '.', match[1])}@{domain}".lower()
        yield PiiMatch(match.start(), match.end(), "email", "email", value)


def _is_spoken(match: re.Match[str]) -> bool:
    """Whether `name at host dot com` is an address: `look at amazon dot com` and `LOOK AT amazon.com` are not."""
    local, at, dot = match[1], match[2], match[4]
    if (at == " at " and dot == ".") or not re.search("[A-Za-z]", local):
        return False
    before = match.string[max(0, match.start() - 60) : match.start()]
    is_mail = _MAIL_BEFORE.search(before) or _MAIL_AFTER.match(match.string, match.end())
    if is_mail and local.lower() not in (
        "me",
        "us",
        "them",
        "him",
        "her",
        "page",
        "site",
    ):
        return True
    if at == " AT " and dot == ".":
        return before.endswith(("<", "("))
    return not local.isupper() if at == " AT " else not local.isalpha()


# --- IP addresses ---

# A pattern that begins with a literal is ten times as fast as one that begins with any digit.
_THREE_DOTS = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
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
# These look at text in small letters.
_NO_ADDRESS_BEFORE = re.compile(
    r"(?:\b(?:versions?|release|build|revision|firmware|patch|update|upgrade|kernel|runtime|driver|ver|rev|v)\b\.?"
    r"|\b(?:chrome|chromium|firefox|safari|edge|opera|webkit)\b"
    r"|\bupgraded? (?:to|from)|\bupdated? (?:to|from)|\b(?:fixed|added|removed|introduced|deprecated|new) in|\bsince"
    r"|版本号?|版|固件|内核|驱动|升级到|[a-z][/-]|[=~<>!]=|\^"
    r"|\b(?:sections?|sec\.|chapters?|clauses?|articles?|rules?|regulations?|para(?:graph)?s?\.?)"
    r"|\b(?:figures?|fig\.|tables?|appendix|oid)"
    r"|§|第|条|章|节|節|款|编号)[\s:：=(\"']*\Z"
)
_NO_ADDRESS_AFTER = re.compile(
    r"[)\"']?\s?(?:版|节|章|条|款|(?:(?:is|was|has been|were) )?(?:now )?(?:released?|available|published)\b"
    r"|came out\b|runtime\b|\((?:build|beta|rc)\b)"
)
_NETWORK_BEFORE = re.compile(
    r"(?:(?<![a-z])ips?\b|ipv4|address|(?<![a-z])hosts?\b|hostname|(?<!sql )(?<!http )(?<!windows )"
    r"(?<!exchange )server\b"
    r"|\bdns|\bping\b|gateway|\bproxy\b|\blog(?:ged|in|s|on)?\b"
    r"|\bfrom\b|\bclients?\b|\bpeers?\b|\bremote|\bconnect|\bssh\b|\bcurl\b|\btelnet\b|\bresolver?s?\b|\bvisitors?\b"
    r"|\bblock|\bban|\battack|\brequest|\bsubnet|\brouter?|\btraceroute|\binet\b|\bwhois\b|\baddr|\bsrc\b|\bdst\b"
    r"|\b(?:allow|deny|listen|bind|upstream|nameserver|forwarded|firewall|spamm?er|hacker|адрес|сервер)"
    r"|地址|服务器|主机|来自|来源|访问|登录|登陆|客户端|网关|节点|攻击|://|@)[^\n]{0,24}\Z"
)
_NETWORK_AFTER = re.compile(
    r":[0-9]{2,5}\b|/(?:8|1[0-9]|2[0-9]|3[0-2])\b(?!/)| - - |的请求|\s(?:port|端口)\b"
)
_HEADING_AFTER = re.compile(r"\.\s[A-Z]")
_CHANGES_BEFORE = re.compile(r"(?:\A|\n)(?:#{1,4} \[?|\[)\Z")  # the heading of a list of changes
_WORD_BEFORE = re.compile(r"([^\W一-鿿][\w.#+-]+)[ \t(\[\"'=:]{1,3}\Z")
_FUNCTION_WORDS = frozenset(
    "a an the at to of for by is was are were and or on in with via as be than like through against it used uses using "
    "had has got been called".split()
)


def _around(signs: list[int], pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    for start, end in spans_around(signs, 48, 48):
        yield from pattern.finditer(text, start, min(len(text), end))


def find_ipv4(text: str, private: bool, is_code: bool) -> Iterator[PiiMatch]:
    """IPv4 addresses. Versions, sections and other numbers of four parts are told apart by the words around them."""
    signs = [match.start() for match in _THREE_DOTS.finditer(text)]
    for match in _around(signs, _IPV4, text):
        octets = match[0].split(".")
        if any(int(octet) > 255 or (octet[0] == "0" and len(octet) > 1) for octet in octets):
            continue
        if _is_reserved(match[0], private):
            continue
        if _is_address(match, list(map(int, octets)), is_code):
            yield PiiMatch(match.start(), match.end(), "ip", "ipv4", match[0])


@lru_cache(maxsize=4096)
def _is_reserved(text: str, private: bool) -> bool:
    address = ipaddress.IPv4Address(text)
    return any(address in net for net in _NEVER_V4 + ([] if private else _PRIVATE_V4))


def _is_address(match: re.Match[str], octets: list[int], is_code: bool) -> bool:
    text, (start, end) = match.string, match.span()
    before, after = text[max(0, start - 32) : start].lower(), text[end : end + 16].lower()
    if _NO_ADDRESS_BEFORE.search(before[-24:]) or _NO_ADDRESS_AFTER.match(after):
        return False
    if before[-1:] in ("", "\n") and _HEADING_AFTER.match(text, end):
        return False
    if _CHANGES_BEFORE.search(before):
        return False
    if _NETWORK_AFTER.match(after):
        return True
    word = _WORD_BEFORE.search(before)
    is_network = bool(_NETWORK_BEFORE.search(before))
    is_named = (
        word is not None
        and word[1] not in _FUNCTION_WORDS
        and not _NETWORK_BEFORE.search(before, word.start(1))
    )
    # 4.1.2.3 and 2.6.38.6 are headings or versions more often than hosts, and so is 15.0.90.1 after a name or in a
    # program.
    if is_named and (octets[0] < 32 or octets[1] == 0):
        return False
    return is_network or (max(octets) >= 32 and (octets[0] >= 32 or (octets[0] >= 10 and not is_code)))


def find_ipv6(text: str, private: bool) -> Iterator[PiiMatch]:
    """IPv6 addresses with at least three groups, so that a slice `x[2000::3]` is none."""
    signs = [match.start() for match in _TWO_COLONS.finditer(text)]
    for match in _around(signs, _IPV6, text):
        raw = match[0]
        if sum(map(bool, raw.split(":"))) < 3:
            continue
        try:
            address = ipaddress.IPv6Address(raw)
        except ValueError:
            continue
        if any(address in net for net in _NEVER_V6):
            continue
        if any(address in net for net in _PUBLIC_V6 + (_PRIVATE_V6 if private else [])):
            yield PiiMatch(match.start(), match.end(), "ip", "ipv6", address.exploded)
