"""Personal data and secrets: how many are found by kind, and how many look-alikes are left alone.

The rules were tuned on the sentences of personal_data.tsv. Those of personal_data_unseen.tsv were tried once, and no
rule was changed for them, so that only they say what is found in new text. Their values are made from a seed, so that
no real person's are there and no scanner of secrets takes the file for a leak.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.curation.figures import Figure
from data_tools.record import UNKNOWN, Record
from data_tools.stages.pii.config import PiiConfig
from data_tools.stages.pii.finding import id_check_digit
from data_tools.stages.pii.numbers import luhn
from data_tools.stages.pii.stage import PiiStage

SENTENCES = Path(__file__).with_suffix(".tsv")
UNSEEN = SENTENCES.with_name("personal_data_unseen.tsv")
SEEDS = range(6)
_LEAK_CHARS = 10
OPTIONAL = ("national_id", "iban")
PEER_KINDS = ("email", "ip")
"""What datatrove's formatter replaces."""

WORD = string.ascii_letters + string.digits
ALPHABETS = {
    "D": string.digits,
    "N": "23456789",
    "L": string.ascii_lowercase,
    "U": string.ascii_uppercase + "234567",
    "W": WORD,
    "H": "0123456789abcdef",
    "B": WORD + "+/",
    "S": WORD + "-_",
}


class Case(NamedTuple):
    """A text with a piece of personal data, or without one."""

    kind: str
    text: str
    part: str | None
    """The personal data; None if the text only looks as if it had some."""
    language: str


class Maker:
    """Makes values that have the form of personal data."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def fill(self, form: str) -> str:
        """A text with each `<...>` replaced by a new value."""
        return re.sub(r"<([DNLUWHBS])([0-9]+)>|<([a-z_A-Z]+)>", self._value, form)

    def _value(self, match: re.Match[str]) -> str:
        if match[1]:
            return self._chars(ALPHABETS[match[1]], int(match[2]))
        name, _, country = match[3].partition("iban_")
        if country:
            return self._iban(country, is_spaced=name == "spaced_")
        method = getattr(self, match[3], None)
        return method() if method else match[0]

    def _chars(self, alphabet: str, count: int) -> str:
        return "".join(self.random.choices(alphabet, k=count))

    def name(self) -> str:
        first = self.random.choice(
            "anna jose li.wei m.keller priya omar zhang_min olga dr.smith ben-ami".split()
        )
        return first + self.random.choice(("", self.fill("<D2>"), self.fill(".<L6>")))

    def host(self) -> str:
        top = self.random.choice("com org de co.uk edu cn io net fr com.br".split())
        return f"{self.fill('<L7>')}.{top}"

    def ip(self) -> str:
        special = (100, 127, 169, 172, 192, 198, 203)
        first = self.random.choice([n for n in range(11, 223) if n not in special])
        return f"{first}." + ".".join(str(self.random.randrange(256)) for _ in range(3))

    def escaped_line(self) -> str:
        """The end of a line inside a string of JSON."""
        return r"\n"

    def version(self) -> str:
        """Four numbers as versions have them, all below 256."""
        return ".".join(str(self.random.randrange(limit)) for limit in (24, 30, 256, 256))

    def citizen(self) -> str:
        """A Chinese identity number."""
        region = self.random.choice("110105 310104 440308 510107 330106 420111 610113".split())
        month, day = self.random.randrange(1, 13), self.random.randrange(1, 29)
        body = f"{region}{self.random.randrange(1950, 2010)}{month:02}{day:02}{self.fill('<D3>')}"
        return body + id_check_digit(body)

    def wrong_citizen(self) -> str:
        good = self.citizen()
        return good[:17] + ("2" if good[17] == "1" else "1")

    def card(self) -> str:
        prefixes = (
            ("4", 16),
            ("52", 16),
            ("55", 16),
            ("37", 15),
            ("622848", 19),
            ("6011", 16),
            ("621700", 19),
        )
        prefix, length = self.random.choice(prefixes)
        body = prefix + self._chars(string.digits, length - len(prefix) - 1)
        return next(body + digit for digit in string.digits if luhn(body + digit))

    def wrong_card(self) -> str:
        good = self.card()
        return f"{good[:-1]}{(int(good[-1]) + self.random.randrange(1, 10)) % 10}"

    def spaced_card(self) -> str:
        digits, sign = self.card(), self.random.choice(" -")
        groups = (
            re.findall(".{1,4}", digits) if len(digits) != 15 else [digits[:4], digits[4:10], digits[10:]]
        )
        return sign.join(groups)

    def _iban(self, country: str, is_spaced: bool = False) -> str:
        forms = {
            "DE": "<D18>",
            "GB": "NWBK<D14>",
            "FR": "<D23>",
            "NL": "ABNA<D10>",
            "ES": "<D20>",
            "CH": "<D17>",
        }
        account = self.fill(forms[country])
        number = int("".join(str(int(char, 36)) for char in account + country + "00"))
        value = f"{country}{98 - number % 97:02}{account}"
        return " ".join(re.findall(".{1,4}", value)) if is_spaced else value

    def wrong_iban(self) -> str:
        good = self._iban("DE")
        return f"{good[:2]}{(int(good[2:4]) + 1) % 97:02}{good[4:]}"


def all_cases(seeds: Iterable[int] = SEEDS, sentences: Path = SENTENCES) -> Iterator[Case]:
    """Every sentence with new values for each seed."""
    lines = sentences.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    for seed in seeds:
        make = Maker(seed)
        for kind, verdict, language, form in rows:
            before, _, rest = form.replace("\\n", "\n").partition("[[")
            part, _, after = rest.partition("]]")
            before, part, after = make.fill(before), make.fill(part), make.fill(after)
            yield Case(
                kind, before + part + after, part if verdict == "personal" else None, language or UNKNOWN
            )


def ours(case: Case) -> str:
    """The text as the stage leaves it, with an optional kind turned on for its own cases."""
    stage = PiiStage(PiiConfig(**({case.kind: True} if case.kind in OPTIONAL else {})))
    record = Record(id="1", text=case.text, source="s", language=case.language)
    stage.process(record)
    return record.text


def _peer() -> Callable[[Case], str]:
    from datatrove.pipeline.formatters import PIIFormatter

    formatter = PIIFormatter()
    return lambda case: formatter.format(case.text)


def leaks(part: str, cleaned: str) -> bool:
    """Whether ten characters in a row of the personal data, or all of it, are left."""
    length = min(len(part), _LEAK_CHARS)
    return any(part[at : at + length] in cleaned for at in range(len(part) - length + 1))


class Rates(NamedTuple):
    """What was counted over the cases of a kind."""

    found: int
    personal: int
    wrong: int
    """Look-alikes that were changed."""

    @classmethod
    def of(cls, cases: list[Case], clean: Callable[[Case], str]) -> Rates:
        personal = [case for case in cases if case.part is not None]
        found = sum(not leaks(case.part, clean(case)) for case in personal if case.part)
        return cls(found, len(personal), sum(clean(case) != case.text for case in cases if case.part is None))

    @property
    def recall(self) -> float:
        return self.found / self.personal

    @property
    def precision(self) -> float:
        return self.found / max(1, self.found + self.wrong)


def measure(corpora: Path) -> list[Figure]:
    """Recall and precision by kind, and their spread over the seeds. datatrove replaces email and IP addresses."""
    peer = _peer()
    figures = []
    for label, sentences in (("", SENTENCES), (", unseen", UNSEEN)):
        by_seed = [list(all_cases([seed], sentences)) for seed in SEEDS]
        kinds = list(dict.fromkeys(case.kind for case in by_seed[0]))
        for name, members in [(kind, (kind,)) for kind in kinds] + [("all kinds", tuple(kinds))]:
            own = [[case for case in cases if case.kind in members] for cases in by_seed]
            seeds = [Rates.of(cases, ours) for cases in own]
            theirs = Rates.of([case for cases in own for case in cases], peer) if name in PEER_KINDS else None
            figures += _figures(name + label, seeds, theirs)
    return figures


def _figures(name: str, seeds: list[Rates], theirs: Rates | None) -> list[Figure]:
    total = Rates(*map(sum, zip(*seeds, strict=True)))
    recalls, precisions = ([getattr(rates, what) for rates in seeds] for what in ("recall", "precision"))
    return [
        Figure(
            f"{name}: recall",
            total.recall,
            f"{total.found} of {total.personal}, seeds {min(recalls):.3f} to {max(recalls):.3f}",
            ">= 0.9",
            theirs.recall if theirs else "no such stage",
        ),
        Figure(
            f"{name}: precision",
            total.precision,
            f"{total.found} of {total.found + total.wrong}, seeds {min(precisions):.3f} to {max(precisions):.3f}",
            ">= 0.95",
            theirs.precision if theirs else "no such stage",
        ),
    ]
