"""Finds phone, identity and card numbers: digits that a checksum, a plan of numbers or a word confirms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from typing import Any

from data_tools.stages.pii.finding import PiiMatch, id_check_digit, spans_around

# Seven or more digits with at most two signs between them. No number that is looked for below is shorter.
_CLUSTER = re.compile(r"[0-9](?:(?:[ ()./\-\u00a0（）]{0,2}| / )[0-9]){6,}")
_BEFORE = r"(?<![0-9A-Za-z_])(?<![0-9][.,\-])(?<![0-9] )"
_AFTER = r"(?![0-9A-Za-z_]|[.,\-][0-9]| [0-9])"

Taken = tuple[str, str] | None
"""The form of the placeholder and the value in one form; None for a number that means something else."""


def find_numbers(text: str, kinds: set[str], is_code: bool) -> Iterator[PiiMatch]:
    """Phone, identity and card numbers of the kinds that are asked for."""
    rules = [rule for rule in _RULES if rule[0] in kinds]
    last_phone = -99
    for cluster in _CLUSTER.finditer(text):
        start, end = max(0, cluster.start() - 3), min(len(text), cluster.end() + 8)
        for kind, pattern, check in rules:
            for match in pattern.finditer(text, start, end):
                taken = check(match, is_code) if match.start() < cluster.end() else None
                if taken:
                    yield PiiMatch(match.start(), match.end(), kind, *taken)
                    last_phone = match.end() if kind == "phone" else last_phone
        if "phone" in kinds:
            for found in _national_phones(cluster, is_code, last_phone):
                last_phone = found.end
                yield found
    if "national_id" in kinds:
        yield from _find_national_ids(text)
    if "iban" in kinds:
        yield from _find_ibans(text)


# --- identity numbers and cards ---

_ID = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.\-])"
    r"([1-8][0-9]{5})[ -]?((?:19|20)[0-9]{6})[ -]?([0-9]{3}[0-9Xx])(?![0-9A-Za-z_]|[.\-][0-9])"
)
_OLD_ID = re.compile(_BEFORE + r"([1-8][0-9]{5})([0-9]{2})([01][0-9])([0-3][0-9])[0-9]{3}" + _AFTER)
_OLD_ID_BEFORE = re.compile(r"(?:身份证|身分证|居民证|证件|旧证|证号|一代证)[^\n\d]{0,10}\Z")
_PROVINCES = frozenset(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83".split()
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
_CARD_BEFORE = re.compile(
    r"(?:card|visa|master|amex|american express|discover|jcb|diners|unionpay|debit|credit|\bpan\b|\bcc\b|卡|银联)"
    r"[^\n]{0,24}\Z",
    re.IGNORECASE,
)


def _check_id(match: re.Match[str], is_code: bool) -> Taken:
    region, born, tail = match.groups()
    value = (region + born + tail).upper()
    if not _is_date(int(born[:4]), int(born[4:6]), int(born[6:])):
        return None
    if region[:2] not in _PROVINCES or int(born[:4]) > 2050 or id_check_digit(value[:17]) != value[17]:
        return None
    return "id_number", value


def _check_old_id(match: re.Match[str], is_code: bool) -> Taken:
    region, year, month, day = match.groups()
    if region[:2] not in _PROVINCES or not _is_date(1900 + int(year), int(month), int(day)):
        return None
    return ("id_number", match[0]) if _OLD_ID_BEFORE.search(_line_before(match, 24)) else None


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it (ISO/IEC 7812-1, annex B)."""
    doubled = "0246813579"
    return (sum(map(int, digits[-1::-2])) + sum(int(doubled[int(d)]) for d in digits[-2::-2])) % 10 == 0


def _check_card(match: re.Match[str], is_code: bool) -> Taken:
    digits = re.sub("[ -]", "", match[0])
    # fewer than four different digits: round numbers, and the test number 4111 1111 1111 1111
    if len(set(digits)) < 4 or not _ISSUER.fullmatch(digits) or not luhn(digits):
        return None
    before = _line_before(match, 40)
    # Every tenth number has a valid check digit, and cards of 13 digits are no more: they are EAN or milliseconds.
    is_other = len(digits) == 13 or _OTHER_BEFORE.search(before) or (is_code and match[0] == digits)
    return None if is_other and not _CARD_BEFORE.search(before) else ("bank_card", digits)


# --- phones ---

_MOBILE = re.compile(
    _BEFORE + r"((?:\+|00)86[- ]?|\(\+?86\) ?|86[- ])?(1[3-9][0-9]([ -]?)[0-9]{4}\3[0-9]{4})" + _AFTER
)
_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.,\- ])(?:(?:\+|00)86[- ]?\(?0?|[(（](?=0[0-9]{2,3}[)）])0|0)"
    r"(10|2[0-9]|[3-9][0-9]{2})([)）] ?|[)）]?-| ?)([2-8][0-9]{6,7}|[2-8][0-9]{2,3}[ -][0-9]{4})"
    r"(?:(?:-|转)[0-9]{1,5})?" + _AFTER
)
_NORTH_AMERICAN = re.compile(
    r"(?<![0-9A-Za-z_+(])(?<![0-9][.,\-])(?:\+?1[-. ]?)?"
    r"(?:\(([2-9][0-9]{2})\)[ -]?|([2-9][0-9]{2})([-. ]))([2-9][0-9]{2})[-. ]([0-9]{4})" + _AFTER
)
_INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z_+)\]])\+([1-9][0-9]{0,3})"
    r"((?:[ .\-\u00a0]?\(0\))?(?:[ .\-\u00a0]{0,2}\(?[0-9]{1,5}\)?){2,6}|[0-9]{7,12})" + _AFTER
)
_TOLL_FREE = frozenset(
    "400 800 833 844 855 866 877 888 900".split()
)  # and those of which the caller pays more

# Words that stand before a phone number and hardly ever before another number.
_SURE_WORDS = (
    r"(?:tele|cell|mobile|home|work|smart|i)?phones?|tel(?:e?fono|[ée]fono|efon|[ée]phone|efoon|efone|s)?|t[ée]l"
    r"|(?:tele)?fax|ph|mob(?:ile?|il)?|m[óo]vil|mobiel|tfno|cel(?:l|ular|lulare)?|handy|gsm|whats ?app|viber|wechat"
    r"|hotline|sms"
    r"|(?:ruf|handy|telefon)nummer|portable|tlf|tfn|puh(?:elin)?|festnetz|fone|тел(?:ефону?)?|моб|τηλ(?:έφωνο)?|kom(?:órka)?|cep"
    r"|handphone|no\.? ?hp|hp(?= ?[:/])|tlm|natel|telem[óo]vel|di động|κινητό|mobitel|faks|мобільний"
    r"|điện thoại|s?đt|telp|zadzwoń|(?:по)?звоните|(?:по)?звонить|дзвоніть"
)
_SURE_CHINESE = (  # and Japanese and Korean
    "☎|☏|📞|📱|电话|電話|传真|傳真|热线|熱線|手机|手機|行動|座机|座機|携帯|联系方式|聯絡方式|微信同号|ファックス"
    "|전화|휴대폰|핸드폰|연락처|팩스|โทร|มือถือ|फ़ोन|फोन|मोबाइल|هاتف|تلفن|فون|جوال|موبايل|טלפון|נייד"
)
_WORDS = (
    r"call(?:ed|ing)?|dial|ring|text|reach|contact|telegram|signal|(?:an)?ruf(?:en)?|appele[zr]|ll[aá]m[ae](?:me)?"
    r"|chiam[ai]|ligue|ligar|kontakt|hubungi|liên hệ|bel(?:len)?"
)
_WORDS_CHINESE = (
    "問い?合わ?せ|連絡先|문의|संपर्क|اتصل|联系|聯絡|联络|致电|致電|拨打|撥打|微信|来电|呼叫|咨询|報名|报名|客服"
)


def _word(words: str, chinese: str, gap: str) -> re.Pattern[str]:
    capital = r"(?<=[a-z])(?:Phone|Mobile|Tel|Fax)"  # userPhone
    end = r"(?:(?![A-Za-z])|(?=[A-Z][a-z]|(?i:num|nr|no\b)))"
    return re.compile(rf"(?:(?:(?<![A-Za-z])(?i:{words})|{capital}){end}{gap}|{chinese})\Z")


# A digit after the word belongs to another number, except a word and its count: `Tel 2: `.
_GAP = r"[^\n\d]{0,24}(?:(?:\b[1-9]\b|\d{1,3}\])[^\n\d]{1,4})?"
_SURE_BEFORE = _word(_SURE_WORDS, rf"(?:{_SURE_CHINESE}){_GAP}", _GAP)
_WORD_BEFORE = _word(
    f"{_SURE_WORDS}|{_WORDS}", rf"(?:{_SURE_CHINESE}){_GAP}|(?:{_WORDS_CHINESE})[^\n\d]{{0,6}}", _GAP
)
_WORD_AFTER = re.compile(
    r"[\s\-,]?[(（\[]?(?i:mobile|mob\b|cell|tel\b|fax|phone|whatsapp|home\b|office\b|work\b)|[\s（(]?(?:手机|电话|微信)"
)
_OTHER_BEFORE = re.compile(
    r"(?:\b(?:prices?|serial|orders?|part|model|sku|invoice|ref(?:erence)?|isbn|issn|ean|upc|gtin|ticket|tracking|item"
    r"|articles?|population|id|code|patent|case|accounts?|acct|batch|lot|offset|sizes?|bytes|total|sum|count|seed"
    r"|timestamps?|time|dates?|table|version|parcel|shipment|confirmation|transaction|number of)\b"
    r"|第|[¥￥$€£#№=]|单号|訂單|订单|编号|編號|型号|货号|批号|价|金额|总额|人口|QQ|股票|代码|账号|帐号|流水|序列"
    r"|运单|案号|备案|许可证|发票|条码|约|共计)[^\d\n]{0,8}\Z",
    re.IGNORECASE,
)
_UNIT_AFTER = re.compile(
    r"\s?(?:元|人|年|米|公里|千米|吨|%|号|次|个|字节|万|亿|bytes?\b|kg\b|km\b|USD|dollars|people|€)"
)
_OPERATOR_BEFORE = re.compile(
    r"[0-9]:\Z|[=!<>]=\s?\Z|[\w)] ?[+*%^] ?\Z|=\s?\Z|[A-Za-z_\])][(\[]\s?\Z|\s-\s\Z"
)
_OPERATOR_AFTER = re.compile(r"[ \t]?(?:\*(?!\*)|[+%^])|\s[-=]\s")


_NO_WORDS = re.compile(r"[\s\d+()\[\]]*")
_NO_DIGITS = re.compile(r"(?:[^\d\n]*(?:\b[1-9]\b|\[\d{1,3}\]))?[^\d\n]*\Z")


def _line_before(match: re.Match[str], limit: int) -> str:
    """The line up to the number, with the label on the line before it: `Phone:`."""
    text, start = match.string, match.start()
    first = max(0, start - limit)
    line = text.rfind("\n", first, start) + 1 or first
    if start - line <= 8 and text.endswith(":\n", first, line) and _NO_WORDS.fullmatch(text, line, start):
        label = text.rfind("\n", first, line - 1) + 1 or first
        return text[label : line - 1] + " " + text[line:start]
    return text[line:start]


def _after_digits(before: str) -> str:
    """What follows the last number, and the count in `Tel 2: `: only a word there belongs to the next number."""
    return _NO_DIGITS.search(before)[0]


def _has_word(match: re.Match[str]) -> bool:
    """Whether a word of phones stands before the number on its line, or right after it."""
    before = _after_digits(_line_before(match, 48))
    return bool(_WORD_BEFORE.search(before) or _WORD_AFTER.match(match.string, match.end()))


def _is_other(match: re.Match[str]) -> bool:
    """Whether the text around a number without a word of phones says that it is something else."""
    return bool(
        _OTHER_BEFORE.search(_line_before(match, 32))
        or _UNIT_AFTER.match(match.string, match.end())
        or _OPERATOR_BEFORE.search(match.string, max(0, match.start() - 3), match.start())
        or _OPERATOR_AFTER.match(match.string, match.end())
    )


def _is_placeholder(digits: str) -> bool:
    return (
        digits[-11:-4] == "1380000"
        or (len(digits) >= 10 and digits[-7:-2] == "55501")
        or (len(digits) == 11 and digits.startswith("0100000"))
    )


def _check_mobile(match: re.Match[str], is_code: bool) -> Taken:
    digits = re.sub("[ -]", "", match[2])
    if _is_placeholder(digits) or len(set(digits)) < 3:
        return None
    if not _has_word(match) and (
        is_code or _is_other(match) or _is_signed(match) or _is_in_foreign_prose(match)
    ):
        return None
    return ("mobile +86" if match[1] else "mobile"), digits


def _is_in_foreign_prose(match: re.Match[str]) -> bool:
    """Whether plain digits stand among words but not among Chinese ones, where they are a count."""
    line = _line_before(match, 40) + match.string[match.end() : match.end() + 40].partition("\n")[0]
    is_plain = match[0].isdigit() and re.search("[A-Za-z]{2}", line)
    return bool(is_plain) and not re.search("[\u4e00-\u9fff]", line)


def _check_landline(match: re.Match[str], is_code: bool) -> Taken:
    is_bare = not match[2].strip() and "86" not in match[0][:5]
    if is_bare and not _SURE_BEFORE.search(_line_before(match, 48)):
        return None
    if not _has_word(match) and (is_code or _is_other(match)):
        return None
    return "landline", match[1] + re.sub("[ -]", "", match[3])


def _check_north_american(match: re.Match[str], is_code: bool) -> Taken:
    area, exchange, line = match[1] or match[2], match[4], match[5]
    if area in _TOLL_FREE or area.endswith("11") or exchange.endswith("11"):
        return None
    if exchange == "555" and line.startswith("01"):
        return None
    # Columns of numbers look the same as groups with blanks between them.
    is_plain = match[3] == " " and not match[0].startswith(("+", "1 "))
    if (is_plain or is_code or _is_other(match)) and not _has_word(match):
        return None
    return "north american", area + exchange + line


def _check_international(match: re.Match[str], is_code: bool) -> Taken:
    digits = re.sub("[^0-9]", "", match[0])
    trunk = "(0)" in match[0]
    if not 9 <= len(digits) - trunk <= 15 or len(set(digits)) < 4 or _is_placeholder(digits):
        return None
    valid = _international("+" + re.sub("[^0-9]", "", match[0].replace("(0)", "")))
    if _has_word(match) and (valid or _is_direct(match.string, match.start())):
        return "international", digits
    if not valid:
        return None
    if is_code or _is_signed(match) or _is_other(match):
        return None
    groups = re.findall("[0-9]+", match[0].replace("(0)", ""))
    return ("international", digits) if _is_grouped(groups, valid, " " in match[0]) else None


def _is_direct(text: str, start: int) -> bool:
    """Whether a sure word stands right before, so that a number that no plan has given out is taken too."""
    near = _after_digits(text[max(0, start - 28) : start])
    return bool(_SURE_BEFORE.search(near[-20:])) and not _OTHER_BEFORE.search(near.rstrip("= '\""))


def _is_signed(match: re.Match[str]) -> bool:
    """Whether a number with a + is a signed one: after a digit or an =, or an added line of a diff."""
    if not match[0].startswith("+"):
        return False
    before, after = match.string[: match.start()][-80:], match.string[match.end() : match.end() + 3]
    if re.search(r"[0-9=][ \t]*\Z", before):
        return True
    is_line = not before or before.endswith("\n")
    return is_line and bool(re.search(r"\n[-+@][^\n]*\n\Z", "\n" + before) or re.match(r"\n[-+@]", after))


def _is_grouped(groups: list[str], formatted: str, has_blanks: bool) -> bool:
    """Whether digits are grouped like a phone number: as its country does, or finer, and not by thousands alone."""
    usual = re.findall("[0-9]+", formatted)
    if groups == usual:
        return len(groups) > 2
    ends, usual_ends = _ends(groups), _ends(usual)
    by_thousands = has_blanks and all(len(group) == 3 for group in groups[1:])
    return len(groups) > 2 and not by_thousands and usual_ends[0] in ends


def _ends(groups: list[str]) -> list[int]:
    return [sum(map(len, groups[: at + 1])) for at in range(len(groups))]


# --- phones as their country writes them ---

# The countries whose numbers are looked for without a calling code, in this order.
_REGIONS = (
    "US CN GB JP KR TW HK SG IN AU NZ IE FR DE ES IT PT NL BE CH AT SE NO DK FI PL CZ HU RO GR RU UA TR BR MX AR CL CO "
    "PE ZA EG NG KE IL SA AE PK BD LK TH VN ID MY PH"
).split()
_DATE = re.compile(
    r"(?:1[0-9]|20)[0-9]{2}[-./ ](?:(?:1[0-9]|20)[0-9]{2}|[01]?[0-9][-./ ][0-3]?[0-9])(?: [0-9]{1,2})?"
    r"|[0-3]?[0-9][-./ ][0-3]?[0-9][-./ ](?:19|20)[0-9]{2}"
)
_MODEL_BEFORE = re.compile(r"(?:\b(?:model|modell|modelo|modèle|modello)|型号|型號)\W{0,3}\Z", re.IGNORECASE)
_LOCAL = re.compile(r"[2-9][0-9]{2}[-. ][0-9]{4}|[2-8][0-9]{3}[- ]?[0-9]{4}|[2-8][0-9]{6}")


@lru_cache(maxsize=1)
def _library() -> Any:
    import phonenumbers  # Google's plans of numbers of all countries; 20 ms, only where a number is looked at

    return phonenumbers


_PERSONAL = ("fixed_line", "mobile", "voip", "personal_number")


@lru_cache(maxsize=4096)
def _international(number: str) -> str:
    """The number as its country writes it, or "" if it is not valid or no personal one (toll-free, premium)."""
    phones = _library()
    try:
        parsed = phones.parse(number)
    except phones.NumberParseException:
        return ""
    kinds = phones.PhoneNumberType
    personal = (kinds.FIXED_LINE, kinds.MOBILE, kinds.FIXED_LINE_OR_MOBILE, kinds.VOIP, kinds.PERSONAL_NUMBER)
    if phones.number_type(parsed) not in personal:
        return ""
    return phones.format_number(parsed, phones.PhoneNumberFormat.INTERNATIONAL)


@lru_cache(maxsize=1)
def _plans() -> list[tuple[str, str, re.Pattern[str]]]:
    """Per region its name, the digits before a national number and a pattern of the numbers of persons."""
    plans = []
    for region in _REGIONS:
        plan = _library().PhoneMetadata.metadata_for_region(region)
        patterns = [getattr(plan, kind).national_number_pattern for kind in _PERSONAL if getattr(plan, kind)]
        plans.append((region, plan.national_prefix or "", re.compile("|".join(filter(None, patterns)))))
    return plans


@lru_cache(maxsize=4096)
def _regions(digits: str) -> tuple[str, ...]:
    """The regions in which the digits are a phone number."""
    found = []
    for region, prefix, pattern in _plans():
        if len(digits) > 12:
            break
        rest = digits.removeprefix(prefix)
        if pattern.fullmatch(rest) or pattern.fullmatch(digits):
            found.append(region)
    return tuple(found)


@lru_cache(maxsize=4096)
def _is_usual_form(groups: tuple[str, ...]) -> bool:
    """Whether a region writes the number in these groups."""
    phones, digits = _library(), "".join(groups)
    for region in _regions(digits):
        usual = phones.format_number(phones.parse(digits, region), phones.PhoneNumberFormat.NATIONAL)
        if tuple(re.findall("[0-9]+", usual)) == groups:
            return True
    return False


def _national_phones(cluster: re.Match[str], is_code: bool, last_phone: int) -> Iterator[PiiMatch]:
    """Phone numbers without a calling code: after a word of phones or another phone number, or in their usual form."""
    text = cluster.string
    groups = [match.span() for match in re.finditer("[0-9]+", cluster[0])]
    if len(cluster[0]) > 80 or re.match(r"[A-Za-z_*]", text[cluster.end() : cluster.end() + 1]):
        return
    start = cluster.start()
    if text.endswith("%2B", 0, start):  # a + in an address of the web
        if _international("+" + cluster[0]):
            yield PiiMatch(start - 3, cluster.end(), "phone", "international", cluster[0])
        return
    if text.endswith(("wa.me/", "send?phone="), 0, start):  # a chat of WhatsApp
        if _international("+" + cluster[0]):
            yield PiiMatch(start, cluster.end(), "phone", "international", cluster[0])
        return
    if re.search(r"[A-Za-z_0-9][-.,]?\Z|[+/$€£¥￥]\Z", text[max(0, start - 2) : start].removesuffix("(")):
        return
    before = _line_before(cluster, 48)
    near = _after_digits(before)
    if _MODEL_BEFORE.search(near):
        return
    is_sure = bool(_SURE_BEFORE.search(near)) or (
        0 <= start - last_phone <= 6
        and bool(re.fullmatch(r"\s?(?:[,/;、，|&]|or|and|或|和)\s?\(?", text[last_phone:start]))
    )
    if is_sure or _WORD_BEFORE.search(near):
        yield from _phones_after_word(cluster, groups, is_sure)
    elif (
        not is_code
        and re.match(r"[0-9]{2,4}\)|0[0-9]{1,4}-", cluster[0])
        and not _OTHER_BEFORE.search(before[-32:])
    ):
        digits = tuple(re.findall("[0-9]+", cluster[0]))
        is_open = text.endswith("(", 0, start)
        if 9 <= sum(map(len, digits)) <= 12 and ("-" in cluster[0] or is_open) and _is_usual_form(digits):
            yield PiiMatch(start - is_open, cluster.end(), "phone", "north american", "".join(digits))


def _phones_after_word(
    cluster: re.Match[str], groups: list[tuple[int, int]], is_sure: bool
) -> Iterator[PiiMatch]:
    """The longest runs of groups that are valid numbers somewhere."""
    first = 0
    while first < len(groups):
        for last in range(len(groups), first, -1):
            begin, end = groups[first][0], groups[last - 1][1]
            written = cluster[0][begin:end]
            digits = re.sub("[^0-9]", "", written)
            if _is_placeholder(digits):
                first = last
                break
            if not 7 <= len(digits) <= 15 or len(set(digits)) < 3:
                continue
            if digits.removeprefix("1")[:3] in _TOLL_FREE or _DATE.fullmatch(written):
                continue
            is_written = (
                is_sure
                or digits[0] == "0"
                or (len(digits) > 8 and ("-" in written or ")" in written))
                or (
                    len(digits) > 8
                    and last - first > 2
                    and _is_usual_form(tuple(re.findall("[0-9]+", written)))
                )
            )
            valid = _international("+" + digits[2:]) if digits.startswith("00") else _regions(digits)
            if not valid and first == 0 and is_sure and 9 <= len(digits) <= 11:
                is_spaced = digits != written or digits[0] == "0" or len(digits) > 9
                valid = is_spaced and _is_direct(cluster.string, cluster.start())
            if (is_written and valid) or (is_sure and first == 0 and _LOCAL.fullmatch(written)):
                is_open = begin == 0 and cluster.string.endswith("(", 0, cluster.start()) and ")" in written
                at = cluster.start() + begin
                yield PiiMatch(at - is_open, cluster.start() + end, "phone", "north american", digits)
                first = last
                break
        else:
            return


_RULES = (
    ("id_number", _ID, _check_id),
    ("id_number", _OLD_ID, _check_old_id),
    ("bank_card", _CARD, _check_card),
    ("phone", _MOBILE, _check_mobile),
    ("phone", _LANDLINE, _check_landline),
    ("phone", _NORTH_AMERICAN, _check_north_american),
    ("phone", _INTERNATIONAL, _check_international),
)


# --- identity documents of other countries, after their names ---

_NUMBERED = (
    r"(?: (?:del?|of|do) \w{1,20})?(?:[ .-]{0,2}(?:nos?|n[º°]|numbers?|серия|№|nr"
    r"|num(?:mer|[ée]ro|ero)?|id|code|card|号码?|號碼?|字[号號]|编号|番号)\b\.?)?"
    r"(?: is|是|为)?[\s:：#=(（\"']{0,4}"
)
# The names of a document, and the form of its number, as in python-stdnum and Presidio's recognizers. A name in
# capitals is an abbreviation and is not found in small letters.
_DOCUMENTS = (
    ("SSN, social security", r"[0-8][0-9]{2}[- ]?[0-9]{2}[- ]?[0-9]{4}"),  # United States
    ("ITIN, taxpayer", r"9[0-9]{2}[- ]?[0-9]{2}[- ]?[0-9]{4}"),
    ("NINO, NI, national insurance", r"[A-Z]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]"),  # United Kingdom
    ("NHS", r"[0-9]{3}[- ]?[0-9]{3}[- ]?[0-9]{4}"),
    ("SIN, NAS, social insurance", r"[0-9]{3}[- ]?[0-9]{3}[- ]?[0-9]{3}"),  # Canada
    (
        "TFN, tax file, BSN, burgerservicenummer, NIF, NIPC, teudat zehut",
        r"[0-9]{3}[- .]?[0-9]{3}[- .]?[0-9]{2,3}",
    ),
    ("CPF, cpf", r"[0-9]{3}\.?[0-9]{3}\.?[0-9]{3}-?[0-9]{2}"),  # Brazil
    ("DNI, NIE, NIF, c[ée]dula, CC, RUN, RUT", r"[XYZ]?[0-9]{1,2}\.?[0-9]{3}\.?[0-9]{3}-?[0-9A-Za-z]?"),
    (
        "NIR, INSEE, s[ée]curit[ée] sociale, s[ée]cu",
        r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3}(?: ?[0-9]{2})?",
    ),
    (
        "personalausweis(?:nummer)?, ausweisnummer, carte (?:nationale )?d.identit[ée], documento d.identit[àa]",
        r"[A-Z0-9]{1,2}[0-9][A-Z0-9]{6,10}",
    ),
    (
        r"steuer-?id(?:nr)?, steueridentifikationsnummer, idnr\.?, PESEL, TCKN, kimlik(?: no)?, f[øo]dselsnummer",
        r"[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}",
    ),
    (
        "sozialversicherungsnummer, SVNR, rijksregister(?:nummer)?, NISS",
        r"[0-9]{2}[ .]?[0-9]{2}[ .]?[0-9]{2}[ -]?[A-Z]?[0-9]{3}[ .]?[0-9]{1,2}",
    ),
    ("personnummer, CPR, henkil[öo]tunnus, HETU", r"(?:[0-9]{2})?[0-9]{6}[-+A]?[0-9]{3}[0-9A-Z]"),  # Nordic
    ("codice fiscale, CF", r"[A-Z]{6}[0-9]{2}[A-Z][0-9]{2}[A-Z][0-9]{3}[A-Z]"),  # Italy
    ("AHV, AVS", r"756\.?[0-9]{4}\.?[0-9]{4}\.?[0-9]{2}"),  # Switzerland
    ("CURP", r"[A-Z]{4}[0-9]{6}[A-Z]{6}[A-Z0-9][0-9]"),  # Mexico
    ("aadhaa?r, आधार, マイナンバー, 個人番号, my number, ИНН, INN", r"[0-9]{4}[- ]?[0-9]{4}[- ]?[0-9]{4}"),
    ("PAN", r"[A-Z]{5}[0-9]{4}[A-Z]"),  # India
    ("주민등록번호, RRN, resident registration", r"[0-9]{6}-?[1-8][0-9]{6}"),  # Korea
    ("СНИЛС, SNILS", r"[0-9]{3}-?[0-9]{3}-?[0-9]{3}[- ]?[0-9]{2}"),  # Russia
    ("身[分份][證证], ARC, 居留證", r"[A-Z][1-9A-D][0-9]{8}"),  # Taiwan
    ("HKID, 身[分份][證证], hong kong id", r"[A-Z]{1,2}[0-9]{6} ?[(（]?[0-9A][)）]?"),
    ("NRIC, FIN", r"[STFGM][0-9]{7}[A-Z]"),  # Singapore
    ("mykad, IC, NIK, KTP", r"[0-9]{6}-?[0-9]{2}-?[0-9]{4}(?:[0-9]{4})?"),  # Malaysia, Indonesia
    ("ID, identity, บัตรประชาชน", r"[0-9][- ]?[0-9]{4}[- ]?[0-9]{5}[- ]?[0-9]{2}[- ]?[0-9]"),  # Thailand
    (
        "passport, passeport, pasaporte, reisepass, passaporto, 护照, 護照, 旅券, паспорт",
        r"[A-Z]{0,2} ?[0-9]{2} ?(?:[0-9]{4,7}[A-Z]?|[0-9]{2} ?(?:№ ?)?[0-9]{6})",
    ),
    ("港澳通行证, 通行证, 台胞证, 回乡证", r"[A-Z]?[0-9]{8,10}"),
    ("driver'?s licen[cs]e, driving licen[cs]e, DL, 驾驶证, 驾照", r"[A-Z]{0,5}[0-9][A-Z0-9-]{5,16}"),
    ("车牌, 車牌, plate", r"[\u4e00-\u9fff][A-Z][·• -]?[A-Z0-9]{5,6}"),  # of cars in China
)


def _named(names: str, form: str) -> re.Pattern[str]:
    either = "|".join(name if name.isupper() else f"(?i:{name})" for name in names.split(", "))
    return re.compile(rf"(?<![A-Za-z])(?:{either})(?i:{_NUMBERED})({form})(?![0-9A-Za-z]|[.-][0-9])")


_NAMED = tuple(_named(names, form) for names, form in _DOCUMENTS)
# Forms that nothing else has: SSN, CPF, codice fiscale, CURP and AHV.
_UNNAMED = re.compile(
    r"(?<![0-9A-Za-z.-])(?:(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}|[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}"
    r"|[A-Z]{6}[0-9]{2}[A-EHLMPRST][0-9]{2}[A-Z][0-9]{3}[A-Z]|[A-Z]{4}[0-9]{6}[HM][A-Z]{5}[A-Z0-9][0-9]"
    r"|756\.[0-9]{4}\.[0-9]{4}\.[0-9]{2})(?![0-9A-Za-z]|[.-][0-9])"
)
_DOCUMENT_SIGN = re.compile(r"[0-9](?:[A-Z .\-]{0,2}[0-9]){3}")


def _find_national_ids(text: str) -> Iterator[PiiMatch]:
    signs = (match.start() for match in _DOCUMENT_SIGN.finditer(text))
    for start, end in spans_around(signs, 60, 40):
        for pattern in _NAMED:
            for match in pattern.finditer(text, start, min(len(text), end)):
                yield PiiMatch(
                    *match.span(1), "national_id", "national_id", re.sub("[^0-9A-Za-z]", "", match[1]).upper()
                )
        for match in _UNNAMED.finditer(text, start, min(len(text), end)):
            if not _OTHER_BEFORE.search(_line_before(match, 32)):
                yield PiiMatch(
                    *match.span(), "national_id", "national_id", re.sub("[^0-9A-Za-z]", "", match[0])
                )


# Lengths of the SWIFT IBAN registry.
_IBAN_CHARS = {
    country: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 "
        "FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LI21 LT20 LU20 LV21 "
        "MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 "
        "TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
    for country in [entry[:2]]
}
_IBAN = re.compile(r"(?<![0-9A-Za-z])([A-Z]{2})[0-9]{2}(?:[ -]?[A-Z0-9]){11,30}")


def _find_ibans(text: str) -> Iterator[PiiMatch]:
    for match in _IBAN.finditer(text):
        length = _IBAN_CHARS.get(match[1], 99)
        places = [at for at in range(*match.span()) if text[at] not in " -"]
        if len(places) < length:
            continue
        end = places[length - 1] + 1
        value = "".join(text[at] for at in places[:length])
        moved = "".join(
            str(int(char, 36)) for char in value[4:] + value[:4]
        )  # ISO 13616: letters as 10 to 35
        if int(moved) % 97 == 1 and not text[end : end + 1].isalnum():
            yield PiiMatch(match.start(), end, "iban", "national_id", value)
