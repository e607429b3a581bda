"""Replaces personal data and secrets by placeholders that depend only on the replaced value.

Each finder first looks for a cheap sign (an @, a run of digits) and runs its patterns only near it.
"""

from __future__ import annotations

import re

from data_tools.record import CODE, Record
from data_tools.stages.pii.addresses import find_emails, find_ipv4, find_ipv6
from data_tools.stages.pii.config import PiiConfig
from data_tools.stages.pii.finding import PiiMatch, placeholder
from data_tools.stages.pii.keys import find_keys
from data_tools.stages.pii.named import find_named_secrets
from data_tools.stages.pii.numbers import find_numbers

_KINDS = ("secret", "email", "ip", "id_number", "national_id", "iban", "bank_card", "phone")
_MAX_PASSES = 8


class PiiStage:
    """Replaces personal data and secrets, and counts them as `pii.<kind>`. Never drops a document."""

    name = "pii"

    def __init__(self, config: PiiConfig) -> None:
        self._salt = config.salt.encode()
        self._private_ip = config.private_ip
        self._kinds = {kind for kind in _KINDS if getattr(config, kind)}

    def process(self, record: Record) -> str | None:
        # A placeholder can form a new candidate with the text beside it, which takes one more pass.
        for _ in range(_MAX_PASSES):
            found = self._find(record.text, record.language == CODE)
            if not found:
                return None
            for item in found:
                record.count(f"pii.{item.kind}")
            record.text = self._replaced(record.text, found)
        return None

    def _replaced(self, text: str, found: list[PiiMatch]) -> str:
        """The text with a placeholder in the place of each piece."""
        parts, at = [], 0
        for item in found:
            parts += [text[at : item.start], placeholder(item.form, item.value, self._salt)]
            at = item.end
        return "".join(parts) + text[at:]

    def _find(self, text: str, is_code: bool) -> list[PiiMatch]:
        """The pieces to replace, without overlaps: the leftmost piece wins, then the earlier finder."""
        text = _fold_width(text)
        candidates: list[PiiMatch] = []
        if "secret" in self._kinds:
            candidates += find_keys(text)
            candidates += find_named_secrets(text)
        if "email" in self._kinds:
            candidates += find_emails(text, is_code)
        if "ip" in self._kinds:
            candidates += find_ipv4(text, self._private_ip, is_code)
            candidates += find_ipv6(text, self._private_ip)
        candidates += find_numbers(text, self._kinds, is_code)
        candidates.sort(key=lambda item: item.start)
        found: list[PiiMatch] = []
        for item in candidates:
            if not found or item.start >= found[-1].end:
                found.append(item)
        return found


_WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]")  # three times as fast as the run, which few texts have
# Shorter runs of full-width characters are numbers in Chinese prose and initials.
_WIDE_RUN = re.compile("[０-９Ａ-Ｚａ-ｚ＠＋－（）．＿]{7,}")
_FOLD = {ord(wide): ord(wide) - 0xFEE0 for wide in "＠＋－（）＿０１２３４５６７８９"}
_FOLD |= {code: code - 0xFEE0 for first in "Ａａ" for code in range(ord(first), ord(first) + 26)}
# Full-width dots stay in tables of numbers: they are folded within names, and in what is called an address.
_WIDE_DOTS = re.compile(
    r"((?:IP|地址|服务器|主机|来自|登录|访问|网关)[^0-9\n]{0,6}[0-9]{1,3}(?:．[0-9]{1,3}){3}(?![0-9．]))|(?<=[A-Za-z0-9])．(?=[A-Za-z])"
)

_CHINESE_DOT = re.compile(r"(?<=[A-Za-z0-9])。(?=(?:com|cn|net|org)(?![A-Za-z0-9]))")  # name@host。com


def _fold_width(text: str) -> str:
    """Replace full-width letters, digits and signs by ASCII ones; every character keeps its position."""
    if text.isascii():
        return text
    if "＠" in text:
        folded = text.translate(_FOLD)
    elif _WIDE.search(text):
        folded = _WIDE_RUN.sub(lambda run: run[0].translate(_FOLD), text)
    else:
        folded = text
    if "@" in folded and "。" in folded:
        folded = _CHINESE_DOT.sub(".", folded)
    return _WIDE_DOTS.sub(lambda match: match[0].replace("．", "."), folded) if "．" in folded else folded
