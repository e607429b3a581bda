"""Which stages a document passes: those of its source, and the user's own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_tools.curate import curate
from data_tools.curation.choice import CurationConfig
from data_tools.report.funnel import funnel_table
from data_tools.report.schemas import read_curation_report
from pretrain.errors import ConfigError
from support.curating import PROSE, config

MAIL = "Write to jane.doe@corp-mail.com about the tablespoon."
OWN = """
class NoRecipes:
    name = "no_recipes"

    def process(self, record):
        if "fails" in record.text:
            raise KeyError("x")
        if "badly" in record.text:
            return "Not a reason!"
        record.count("no_recipes.mails", record.text.count("@"))
        return "recipe" if "tablespoon" in record.text and record.source == "web" else None
"""
FEW = ("executor.workers=1", "curation.dedup.near=false")


def write(folder: Path, *texts: str) -> list[str]:
    """Each text once in the source `law` and once in the source `web`."""
    records = [
        {"id": f"{s}-{n}", "source": s, "text": text} for n, text in enumerate(texts) for s in ("law", "web")
    ]
    path = folder / "raw.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [path]


def texts_of(output: Path) -> dict[str, str]:
    lines = [line for path in (output / "documents").iterdir() for line in path.open(encoding="utf-8")]
    return {record["id"]: record["text"] for record in map(json.loads, lines)}


def test_a_source_has_its_own_stages_and_options(tmp_path: Path) -> None:
    (raw,) = write(tmp_path, MAIL, PROSE)
    given = "curation.per_source={law: {stages: [normalize], quality: {english: {min_words: 3}}}}"
    more = (*FEW, "curation.stages=[language,quality,pii]", "curation.dedup.exact=false", given)
    assert curate(config(raw, tmp_path / "out", *more)) == 0
    found = texts_of(tmp_path / "out")
    assert found["law-0"] == MAIL, "neither judged nor cleaned of personal data"
    assert "web-0" not in found, "too short for the rules of all"
    assert {"law-1", "web-1"} <= found.keys()
    report = read_curation_report(tmp_path / "out/report.json")
    assert report["stages"] == ["normalize", "language", "quality", "pii"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("{law: {stagse: [pii]}}", "law: stagse"),
        ("{law: {quality: {english: {min_wrds: 3}}}}", "law: .*min_wrds"),
        ("{law: {stages: [no]}}", "law: .*no"),
        ("{law: {dedup: {near: false}}}", "law=.*dedup"),
        ("{law: 3}", "law=3"),
        ("3", "per_source=3"),
    ],
)
def test_wrong_options_of_a_source_are_named(given: str, named: str) -> None:
    from pretrain.config import load_config

    with pytest.raises(ConfigError, match=rf"curation\.per_source.*{named}|{named}"):
        load_config(CurationConfig, [f"per_source={given}"])


def test_options_of_a_source_that_is_not_there(tmp_path: Path) -> None:
    (raw,) = write(tmp_path, PROSE)
    with pytest.raises(ConfigError, match=r"'lwa'.* law, web"):
        curate(config(raw, tmp_path / "out", *FEW, "curation.per_source={lwa: {stages: [pii]}}"))
    assert not (tmp_path / "out/report.json").exists()


def test_a_stage_of_the_users_own(tmp_path: Path) -> None:
    (raw,) = write(tmp_path, MAIL, "A letter to sam.sung@corp-mail.com, and nothing else.")
    (tmp_path / "mine.py").write_text(OWN)
    own = f"curation.own_stages=[{tmp_path}/mine.py:NoRecipes]"
    stages = (*FEW, "curation.stages=[normalize,pii]", "curation.dedup.exact=false", own)
    with pytest.raises(ConfigError, match=r"allow_own_code=true"):
        config(raw, tmp_path / "out", *stages)
    allowed = (*stages, "curation.allow_own_code=true")
    assert curate(config(raw, tmp_path / "out", *allowed)) == 0
    found = texts_of(tmp_path / "out")
    assert found.keys() == {"law-0", "law-1", "web-1"}
    assert not any("corp-mail" in text for text in found.values()), "personal data is looked for afterwards"
    (rejects,) = (tmp_path / "out/rejected/no_recipes").iterdir()
    assert json.loads(gzip.decompress(rejects.read_bytes()))["reason"] == "recipe"
    report = read_curation_report(tmp_path / "out/report.json")
    assert report["tally"]["counts"]["no_recipes.mails"] == 3, (
        "it sees the text before placeholders replace addresses"
    )
    assert "no_recipes" in funnel_table(report)
    (tmp_path / "mine.py").write_text(OWN + "\n")
    with pytest.raises(ConfigError, match="options differ"):
        curate(config(raw, tmp_path / "out", *allowed))


@pytest.mark.parametrize(
    ("text", "named"), [("It fails.", "KeyError.*'x'"), ("It does badly.", "'Not a reason!'")]
)
def test_a_stage_that_fails_is_named_with_the_document(tmp_path: Path, text: str, named: str) -> None:
    (raw,) = write(tmp_path, text)
    (tmp_path / "mine.py").write_text(OWN)
    own = f"curation.own_stages=[{tmp_path}/mine.py:NoRecipes]"
    options = (*FEW, "curation.stages=[normalize]", own, "curation.allow_own_code=true")
    with pytest.raises(ConfigError, match=rf"mine\.py:NoRecipes .*'law-0'|law-0.*{named}") as caught:
        curate(config(raw, tmp_path / "out", *options))
    assert "law-0" in str(caught.value)
