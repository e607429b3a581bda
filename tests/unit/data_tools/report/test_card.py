"""What is said of a corpus: statistics, plots, Croissant, lineage, card; on curated text in English and Chinese."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.config import CardConfig, PrepareConfig, TokenizerConfig
from data_tools.curate import CurateConfig, curate
from data_tools.prepare import prepare
from data_tools.remove import documents_of, remove
from data_tools.report.fertility import measure
from data_tools.report.funnel import Funnel, funnel_table
from data_tools.report.plots import write_plots
from data_tools.report.schemas import read_curation_report
from data_tools.report.statistics import DocumentCounts, drop_figures, length_statistics
from pretrain.config import load_config
from pretrain.corpus.manifest import load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from support.curating import PROSE, write_text
from support.preparing import ENGLISH, config, content, numbered, run, write_jsonl

STATED = CardConfig(
    name="图书馆 and library", description="Reports.", creator="The Library", date_published="2026-03-01"
)
SHOWN_WORDS = 'source "新闻 $1$ <b>" [x]|y'


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    sets = [folder / "quiz.jsonl", folder / "unseen.jsonl"]
    items = (
        PROSE[200:330],
        "When will the orchard be planted again? Nobody in the valley knows it, and nobody asks.",
    )
    for path, item in zip(sets, items, strict=True):
        path.write_text(json.dumps({"text": item}) + "\n")
    text = write_text(folder / "text.jsonl")
    options = [f"input=[{text}]", f"output={folder / 'out'}", "unit_bytes=100000", "executor.workers=1"]
    options.append(f"curation.decontaminate.files=[{sets[0]},{sets[1]}]")
    options.append("curation.decontaminate.mode=annotate")
    assert curate(load_config(CurateConfig, options)) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def prepared(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    assert prepare(options_of(curated, output, card=STATED)) == 0
    return output


def options_of(curated: Path, output: Path, **more: Any) -> PrepareConfig:
    tokenizer = TokenizerConfig(vocab_size=2000)
    options: dict[str, Any] = {"heldout_frac": 0.2, "license": "CC0-1.0", "shard_bytes": 65536}
    return config(output, curated / "documents", tokenizer=tokenizer, **options, **more)


def check_statistics(folder: Path) -> None:
    """Against the documents themselves, read from the shards."""
    statistics, corpus = read(folder / "statistics.json"), Corpus(folder / "manifest.json")
    documents = list(documents_of(corpus))
    lengths = sorted(len(document.tokens) for document in documents)
    assert statistics["root_sha256"] == corpus.manifest.root_sha256
    assert statistics["documents"] == len(documents)
    assert statistics["tokens"] == sum(lengths)
    assert statistics["lengths"]["max"] == lengths[-1]
    assert statistics["lengths"]["p50"] == lengths[(len(lengths) - 1) // 2]
    assert sum(statistics["lengths"]["histogram"].values()) == len(documents)
    tokenizer = Tokenizer.trusted(folder / "tokenizer.model")
    texts = ((tokenizer.decode(document.tokens.tolist()), "") for document in documents)
    fits, _ = measure(tokenizer, texts)
    assert {name: counts["documents"] for name, counts in statistics["scripts"].items()} == {
        name: fit["documents"] for name, fit in fits.items()
    }
    assert {s["name"]: s["tokens"] for s in statistics["sources"]} == dict(
        sum((Counter({d.source: len(d.tokens)}) for d in documents), Counter())
    )
    assert sum(s["text_bytes"] for s in statistics["sources"]) == statistics["text_bytes"]
    assert statistics["funnel"][-1]["documents_out"] == (
        statistics["documents"] + statistics["heldout"]["documents"]
    )


def check_croissant(folder: Path) -> dict[str, Any]:
    """Every file is there with its hash, and everything that is referred to exists."""
    value = read(folder / "croissant.json")
    assert value["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert {"name", "description", "license", "citeAs"} <= value.keys()
    known: set[str] = set()
    for item in value["distribution"]:
        known.add(item["@id"])
        if item["@type"] == "cr:FileObject":
            file = (folder / item["contentUrl"]).read_bytes()
            assert item["sha256"] == hashlib.sha256(file).hexdigest()
            assert item["contentSize"] == f"{len(file)} B"
        else:
            assert {inside["@id"] for inside in item["containedIn"]} <= known
    manifest = load_manifest(folder / "manifest.json")
    assert {shard.name for shard in manifest.shards} <= known
    for record_set in value["recordSet"]:
        for field in record_set["field"]:
            assert field["@id"] == f"{record_set['@id']}/{field['name']}"
            (origin,) = [
                field["source"][key]["@id"] for key in ("fileObject", "fileSet") if key in field["source"]
            ]
            assert origin in known
    assert manifest.root_sha256 in value["citeAs"]
    return value


# --- statistics ---


@given(st.lists(st.integers(2, 5000), min_size=1))
def test_percentiles_are_those_of_the_sorted_list(lengths: list[int]) -> None:
    found = length_statistics(Counter(lengths))
    ordered = sorted(lengths)
    for percent in (5, 50, 95):
        at_most = [n for n in ordered if n <= found[f"p{percent}"]]
        assert len(at_most) * 100 >= percent * len(ordered)  # so many have at most this length
        less = [n for n in ordered if n < found[f"p{percent}"]]
        assert len(less) * 100 < percent * len(ordered)  # and no smaller length will do
    assert found["max"] == ordered[-1]
    assert found["mean"] == round(sum(ordered) / len(ordered), 1)
    assert found["histogram"] == {
        str(2**power): count
        for power in range(13)
        if (count := sum(2**power <= n < 2 ** (power + 1) for n in ordered))
    }


def test_statistics_are_of_the_documents(prepared: Path) -> None:
    check_statistics(prepared)
    assert read(prepared / "statistics.json")["scripts"].keys() == {"cjk", "other"}


def test_the_script_of_characters_in_bytes(prepared: Path) -> None:
    """Characters without an entry are told by their first byte."""
    tokenizer = Tokenizer.trusted(prepared / "tokenizer.model")
    for text, script in (("鬱齾麤", "cjk"), ("ĦŴŶ", "other"), ("鬱ĦŴ", "other"), ("鬱齾Ħ", "cjk")):
        tokens = np.array(tokenizer.encode_document(text))
        assert len(tokens) > len(text) + 2  # in bytes indeed
        counts = DocumentCounts(tokenizer)
        counts.add(tokens, len(text.encode()))
        assert counts.to_json()["scripts"].keys() == {script}


def test_what_was_left_out_is_counted(prepared: Path, curated: Path) -> None:
    statistics, tally = read(prepared / "statistics.json"), read(curated / "report.json")["tally"]
    funnel = statistics["funnel"]
    assert [row["stage"] for row in funnel][-2:] == ["dedup", "prepare"]
    for before, after in pairwise(funnel):
        assert before["documents_out"] == after["documents_in"]
    for row in funnel:
        assert row["documents_in"] - row["documents_out"] == sum(row["dropped"].values())
    assert funnel[0]["documents_in"] == sum(tally["read"].values())
    assert {n: c["documents"] for n, c in statistics["languages"].items()} == tally["languages"]
    assert statistics["duplicates"]["exact"] == tally["dropped"]["dedup/exact_duplicate"]
    assert statistics["duplicates"]["exact"] == 1  # the copy of a report; that report is like another one
    sizes = {int(size): count for size, count in statistics["duplicates"]["cluster_sizes"].items()}
    assert sum(sizes.values()) == statistics["duplicates"]["clusters"]
    assert (
        sum(size * count for size, count in sizes.items())
        == (statistics["duplicates"]["documents_in_clusters"])
    )
    assert statistics["personal_data"].keys() >= {"email", "phone"}
    assert all(tally["counts"][f"pii.{kind}"] == count for kind, count in statistics["personal_data"].items())
    # The reports in English, the copy and the mail share text with the quiz; none does with the other set.
    assert statistics["contamination"] == {"quiz": 14, "unseen": 0}


def test_what_nobody_counted_is_not_zero(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*numbered(20), *numbered(3)])
    assert prepare(config(tmp_path / "out", source)) == 0
    statistics = read(tmp_path / "out/statistics.json")
    assert statistics["personal_data"] is None
    assert statistics["contamination"] is None
    assert statistics["languages"] is None
    assert statistics["duplicates"] == {"exact_in_preparation": 3}
    assert statistics["scripts"]["other"]["documents"] == statistics["documents"] == 19
    card = (tmp_path / "out/README.md").read_text()
    assert "share text with evaluation sets: not counted" in card


def test_several_curations_add_up(curated: Path) -> None:
    report, funnel = read(curated / "report.json"), Funnel(read=2, kept=2)
    one, two = (drop_figures([report] * n, n, funnel) for n in (1, 2))
    assert two["funnel"][0]["documents_in"] == 2 * one["funnel"][0]["documents_in"]
    assert [row["stage"] for row in two["funnel"]] == [row["stage"] for row in one["funnel"]]
    assert two["duplicates"]["clusters"] == 2 * one["duplicates"]["clusters"] > 0
    assert two["contamination"] == {"quiz": 28, "unseen": 0}
    assert drop_figures([report], 2, funnel)["languages"] is None  # the other input's are not known


def test_dropped_documents_count_as_contaminated(tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"text": PROSE[200:330]}) + "\n")
    text = write_text(tmp_path / "text.jsonl")
    options = [f"input=[{text}]", f"output={tmp_path / 'out'}", "executor.workers=1"]
    options += [
        "curation.stages=[decontaminate]",
        f"curation.decontaminate.files=[{tmp_path / 'quiz.jsonl'}]",
    ]
    assert curate(load_config(CurateConfig, options)) == 0
    tally = read(tmp_path / "out/report.json")["tally"]
    assert tally["contaminated"] == {"quiz": 14}
    printed = funnel_table(read_curation_report(tmp_path / "out/report.json"))
    assert "documents with text of evaluation sets: quiz 14" in printed
    assert tally["dropped"]["decontaminate/contaminated"] == 14


# --- plots ---


def test_plots_are_text_in_any_script(prepared: Path, tmp_path: Path) -> None:
    statistics = read(prepared / "statistics.json")
    statistics["sources"].append({"name": SHOWN_WORDS, "tokens": 7})
    statistics["sources"].append({"name": "<b> & \uffff \x07", "tokens": 1})
    alternatives = write_plots(statistics, tmp_path / "plots")
    names = ["duplicates.svg", "funnel.svg", "languages.svg", "lengths.svg", "sources.svg"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names == sorted(alternatives)
    texts = {}
    for name in names:
        tree = ElementTree.parse(tmp_path / "plots" / name)
        texts[name] = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert SHOWN_WORDS in texts["sources.svg"]
    assert r"<b> & � \u0007" in texts["sources.svg"]
    assert "新闻" in texts["sources.svg"]
    assert f"{statistics['funnel'][0]['documents_in']:,}" in texts["funnel.svg"]
    assert SHOWN_WORDS in alternatives["sources.svg"]


def test_the_bars_of_a_plot_are_as_long_as_their_values(prepared: Path, tmp_path: Path) -> None:
    statistics = read(prepared / "statistics.json")
    statistics["sources"] = [{"name": name, "tokens": n} for name, n in (("a", 400), ("b", 100), ("c", 0))]
    statistics["lengths"]["histogram"] = {"16": 3, "64": 12}
    write_plots(statistics, tmp_path / "plots")

    def bars(name: str, size: str) -> list[float]:
        tree = ElementTree.parse(tmp_path / "plots" / name)
        _, *found = tree.iter("{http://www.w3.org/2000/svg}rect")  # the first is the background
        return [float(bar.get(size)) for bar in found]

    longest, *others = bars("sources.svg", "width")
    assert others == [longest / 4, 0]
    tallest = max(bars("lengths.svg", "height"))
    assert bars("lengths.svg", "height") == [tallest / 4, 0, tallest]


# --- Croissant ---


def test_croissant_describes_the_files(prepared: Path) -> None:
    value = check_croissant(prepared)
    assert value["name"] == STATED.name
    assert value["description"] == STATED.description
    assert value["creator"] == {"@type": "sc:Organization", "name": STATED.creator}
    assert value["datePublished"] == STATED.date_published
    assert value["license"] == ["CC0-1.0"]
    assert [record_set["name"] for record_set in value["recordSet"]] == ["shards", "heldout"]


def test_what_is_not_stated_is_left_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", numbered(20))
    assert prepare(config(tmp_path / "out", source, heldout_frac=0.0)) == 0
    value = check_croissant(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out/manifest.json")
    assert not {"creator", "datePublished", "url"} & value.keys()
    assert value["name"] == f"corpus-{manifest.root_sha256[:12]}"
    assert [record_set["name"] for record_set in value["recordSet"]] == ["shards"]


def test_the_reference_implementation_reads_it(prepared: Path) -> None:
    croissant = pytest.importorskip(
        "mlcroissant", reason="mlcroissant is not installed; it brings pandas and scipy"
    )
    dataset = croissant.Dataset(jsonld=str(prepared / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    manifest, heldout = (load_manifest(prepared / p / "manifest.json") for p in (".", "heldout"))
    rows = list(dataset.records("shards"))
    assert [row["shards/tokens"] for row in rows] == [shard.tokens for shard in manifest.shards]
    assert len(list(dataset.records("heldout"))) == heldout.n_documents


# --- lineage ---


def test_lineage_links_each_stage_to_the_next(prepared: Path, curated: Path) -> None:
    lineage = {stage["stage"]: stage for stage in read(prepared / "prepare.json")["lineage"]}
    manifest = load_manifest(prepared / "manifest.json")
    assert list(lineage)[:1] + list(lineage)[-4:] == [
        "out: read",
        "out: dedup",
        "gather",
        "tokenizer",
        "shards",
    ]
    parts = sorted((curated / "documents").iterdir())
    hashes = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in parts)
    assert lineage["out: dedup"]["output_sha256"] == hashlib.sha256(hashes.encode()).hexdigest()
    assert lineage["out: dedup"]["documents_out"] == lineage["gather"]["documents_in"]
    assert lineage["gather"]["bytes_in"] == sum(path.stat().st_size for path in parts)
    assert lineage["gather"]["output_sha256"] == lineage["tokenizer"]["input_sha256"]
    assert lineage["tokenizer"]["output_sha256"] == manifest.tokenizer_sha256
    assert lineage["shards"]["output_sha256"] == manifest.root_sha256
    for stage in lineage.values():
        assert re.fullmatch("[0-9a-f]{64}", stage["options_sha256"])
        assert stage["program"].startswith("pretrain ")
        dropped = sum(stage["dropped"].values())
        assert stage["documents_in"] is None or stage["documents_in"] - stage["documents_out"] == dropped
    assert lineage["tokenizer"]["libraries"]["sentencepiece"]
    assert lineage["out: normalize"]["libraries"]["ftfy"]
    card = (prepared / "README.md").read_text(encoding="utf-8")
    for stage in lineage.values():
        assert f"| {stage['stage']} | `{stage['options_sha256'][:12]}` |" in card


def test_a_hash_changes_with_what_it_stands_for(tmp_path: Path) -> None:
    def stages(name: str, records: list[dict[str, object]], **options: Any) -> dict[str, Any]:
        source = write_jsonl(tmp_path / name / "a.jsonl", records)
        assert prepare(config(tmp_path / name / "out", source, **options)) == 0
        return {stage["stage"]: stage for stage in read(tmp_path / name / "out/prepare.json")["lineage"]}

    first = stages("first", numbered(20))
    assert stages("again", numbered(20)) == first  # another place and time, the same lineage
    assert stages("parts", numbered(20), part_bytes=300) == first
    longer = stages("longer", numbered(20), max_chars=10_000)
    assert longer["gather"]["options_sha256"] != first["gather"]["options_sha256"]
    assert longer["shards"] == first["shards"]
    duplicated = stages("duplicated", numbered(1) + numbered(20))
    assert duplicated["gather"]["input_sha256"] != first["gather"]["input_sha256"]
    assert duplicated["gather"]["output_sha256"] == first["gather"]["output_sha256"]
    other = stages("other", numbered(20, ENGLISH + " So it is."))
    assert other["gather"]["output_sha256"] != first["gather"]["output_sha256"]


# --- what is stated ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"required": True}, "card.name, card.description, card.creator, card.date_published is blank"),
        ({"required": True, "name": "a", "description": " ", "creator": "b", "date_published": "2026-01-01"},
         "card.required=true, and card.description is blank"),
        ({"date_published": "20260101"}, "card.date_published=20260101 is no date; give YYYY-MM-DD"),
        ({"date_published": "2026-02-30"}, "card.date_published=2026-02-30 is no date"),
    ],
)  # fmt: skip
def test_a_wrong_statement_is_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        CardConfig(**options)


def test_a_complete_card_needs_licenses(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", numbered(20))
    complete = CardConfig(name="a", description="b", creator="c", date_published="2026-01-01", required=True)
    with pytest.raises(ConfigError, match="license of a "):
        prepare(config(tmp_path / "out", source, card=complete))
    assert prepare(config(tmp_path / "out", source)) == 0
    with pytest.raises(ConfigError, match=r"card\.required=true.*: a;"):
        prepare(config(tmp_path / "out", source, card=complete))
    assert prepare(config(tmp_path / "known", source, card=complete, license="MIT")) == 0


def test_another_statement_rewrites_the_card_alone(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", numbered(20))
    arguments = (f"input=[{source}]", f"output={tmp_path}/out")
    assert run(*arguments, "card.name=first").returncode == 0
    before = content(tmp_path / "out")
    done = run(*arguments, "card.name=second", "card.date_published=2026-01-01")
    assert done.returncode == 0, done.stderr
    assert "written anew" in done.stdout
    after = content(tmp_path / "out")
    assert {n for n in after if after[n] != before[n]} == {"README.md", "croissant.json", "prepare.json"}
    assert before.keys() == after.keys()
    assert (tmp_path / "out/README.md").read_text().startswith("# second\n")
    assert check_croissant(tmp_path / "out")["datePublished"] == "2026-01-01"
    assert "written anew" not in run(*arguments, "card.name=second", "card.date_published=2026-01-01").stdout


# --- after a takedown ---


def copy_of(prepared: Path, curated: Path, output: Path) -> Path:
    assert prepare(options_of(curated, output, card=STATED)) == 0
    assert content(output) == content(prepared)
    return output


def test_after_a_takedown_all_of_it_is_right(prepared: Path, curated: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, curated, tmp_path / "corpus")
    before, manifest = read(folder / "statistics.json"), load_manifest(folder / "manifest.json")
    longest = max(documents_of(Corpus(folder / "manifest.json")), key=lambda document: len(document.tokens))
    assert remove(folder, {longest.id}) == {longest.id: 1}
    check_statistics(folder)
    check_croissant(folder)
    statistics = read(folder / "statistics.json")
    assert statistics["lengths"]["max"] < before["lengths"]["max"]
    for name in ("languages", "duplicates", "personal_data", "contamination"):
        assert statistics[name] == before[name]
    assert statistics["funnel"][:-1] == before["funnel"][:-1]
    last = read(folder / "prepare.json")["lineage"][-1]
    assert last["stage"] == "remove"
    assert last["input_sha256"] == manifest.root_sha256
    assert last["output_sha256"] == load_manifest(folder / "manifest.json").root_sha256
    assert last["documents_in"] - last["documents_out"] == 1
    assert last["bytes_in"] - last["bytes_out"] == longest.text_bytes
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {STATED.name}\n")
    assert f"`{manifest.root_sha256[:12]}`" in card
    assert content(folder / "plots")["funnel.svg"] != content(prepared / "plots")["funnel.svg"]


def test_a_corpus_of_an_older_program_can_be_cut_too(prepared: Path, curated: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, curated, tmp_path / "corpus")
    report = read(folder / "prepare.json")
    for name in ("card", "lineage"):
        del report[name]
    (folder / "prepare.json").write_text(json.dumps(report))
    (folder / "statistics.json").unlink()
    (folder / "croissant.json").unlink()
    with pytest.raises(ConfigError, match=r"statistics\.json"):
        prepare(options_of(curated, folder, card=STATED))
    assert prepare(options_of(curated, folder)) == 0
    gone = next(documents_of(Corpus(folder / "manifest.json"))).id
    assert remove(folder, {gone}) == {gone: 1}
    check_statistics(folder)
    check_croissant(folder)
    assert read(folder / "statistics.json")["personal_data"] is None
