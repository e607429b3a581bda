"""Curation as a whole: real files, real processes, real text in two languages."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.config import PrepareConfig, TokenizerConfig
from data_tools.curate import _hashes_of_files, curate
from data_tools.curation.choice import STAGES, CurationConfig
from data_tools.curation.collection import Collection, earlier_parts
from data_tools.curation.dedup import DedupConfig, row_type
from data_tools.curation.executors import TaskProgress
from data_tools.curation.phases import CleanTask, Layout
from data_tools.prepare import prepare
from data_tools.reading.units import ReadConfig, units_of
from data_tools.report.funnel import funnel_rows, funnel_table
from data_tools.stages.decontamination.decontaminate import DecontaminateConfig
from pretrain.corpus.manifest import load_manifest
from pretrain.errors import ConfigError
from support import ROOT
from support.curating import PROSE, config, documents
from support.preparing import content


@pytest.fixture(scope="module")
def curated(raw_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process, undisturbed."""
    output = tmp_path_factory.mktemp("curated") / "out"
    assert curate(config(raw_text, output, "executor.workers=1", "curation.dedup.priority=[news]")) == 0
    return output


def kept(folder: Path) -> list[dict[str, Any]]:
    lines = [
        line for path in sorted((folder / "documents").iterdir()) for line in path.open(encoding="utf-8")
    ]
    return [json.loads(line) for line in lines]


def records_of(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.jsonl.gz"))
    return [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]


def rejected(folder: Path) -> dict[str, tuple[str, str]]:
    """id -> stage and reason."""
    found = {}
    for path in sorted((folder / "rejected").glob("*/*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            record = json.loads(line)
            found[record["id"]] = (path.parent.name, record["reason"])
    return found


def test_every_document_is_kept_or_rejected_with_its_reason(curated: Path) -> None:
    ids = [record["id"] for record in kept(curated)]
    out = rejected(curated)
    assert sorted([*ids, *out]) == sorted(record["id"] for record in documents())
    assert len(set(ids)) == len(ids)
    assert {stage for stage, _ in out.values()} <= {*STAGES, "dedup"}
    report = json.loads((curated / "report.json").read_text(encoding="utf-8"))
    rows = funnel_rows(report)
    assert rows[0][1] == f"{len(documents())}"
    assert rows[-1][1] == f"{len(ids)}"
    assert sum(report["tally"]["dropped"].values()) == len(out)
    assert sum(report["tally"]["languages"].values()) == len(ids)


def test_what_is_done_to_text(curated: Path) -> None:
    out = rejected(curated)
    # One of the reports is kept of each language: they differ in two words.
    assert [r["source"] for r in kept(curated)].count("新闻") == 1
    assert [r["source"] for r in kept(curated)].count("news") == 1
    assert out["copies:64"] == ("dedup", "exact_duplicate")
    assert out["short:66"][0] == "quality"
    copies = [record for record in records_of(curated / "rejected" / "dedup") if record["id"] == "copies:64"]
    [first] = [record["id"] for record in kept(curated) if record["source"] == "news"]
    assert copies[0]["kept"].pop("similarity") > 0.8
    assert copies[0]["kept"] == {"id": first, "source": "news"}
    languages = {record["source"]: record["language"] for record in kept(curated)}
    assert languages["新闻"] == "zh"
    assert languages["news"] == "en"
    programs = [record["language"] for record in kept(curated) if record["source"] == "code"]
    assert programs.count("code") > 0.8 * len(programs)  # the rest is mostly comments
    assert not any(
        "corporation.org" in record["text"] or "13812345678" in record["text"] for record in kept(curated)
    )


@pytest.mark.parametrize("workers", [3])
def test_any_number_of_workers_gives_the_same_bytes(
    workers: int, raw_text: Path, curated: Path, tmp_path: Path
) -> None:
    assert len(list((curated / "documents").iterdir())) > 3
    more = (f"executor.workers={workers}", "curation.dedup.priority=[news]")
    assert curate(config(raw_text, tmp_path / "out", *more)) == 0
    assert content(tmp_path / "out") == content(curated)


@pytest.mark.integration
@pytest.mark.long  # test_ray_does_the_same shows in less time that tasks and their results reach Ray's workers
def test_ray_gives_the_same_bytes(raw_text: Path, curated: Path, tmp_path: Path) -> None:
    if not find_spec("ray"):  # not imported here: what curation sets in the environment comes first
        pytest.skip("ray is not installed")
    try:
        more = ("executor.kind=ray", "executor.workers=3", "curation.dedup.priority=[news]")
        assert curate(config(raw_text, tmp_path / "out", *more)) == 0
    finally:
        import ray

        ray.shutdown()
    assert content(tmp_path / "out") == content(curated)


@pytest.mark.integration
@pytest.mark.parametrize("phase", ["clean", "compare", "filter"])
def test_killed_in_any_phase_it_goes_on_to_the_same_bytes(
    phase: str, raw_text: Path, curated: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data_tools.curate", f"input=[{raw_text}]", f"output={output}"]
    command += ["unit_bytes=100000", "executor.workers=2", "curation.dedup.priority=[news]"]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(output.glob(f".work/*/phases/{phase}/completions/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    marked = {path: path.stat().st_mtime_ns for path in output.glob(".work/*/phases/*/completions/*")}
    assert marked
    assert not (output / "report.json").exists()
    kept_before = {path: path.stat().st_mtime_ns for path in output.glob(".work/*/kept/*.jsonl")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert content(output) == content(curated)
    if phase != "clean":  # finished work is not repeated
        assert kept_before
        assert "cleaning: done" not in done.stderr
    assert "already curated" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_only_what_an_earlier_curation_lacks_is_added(curated: Path, tmp_path: Path) -> None:
    """Copies of kept documents go, verbatim or edited; new text stays, and is there for the next curation."""
    [old] = [record for record in kept(curated) if record["source"] == "news"]
    edited = old["text"].replace("architect", "builder")
    new = "A storm took the roof off the old mill last night. " * 2 + "Nobody was hurt, since it stood empty."
    lines = [
        {"id": str(number), "text": text}
        for number, text in enumerate((new, edited, old["text"], new + " So."))
    ]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("executor.workers=1", "curation.stages=[]", f"curation.dedup.against=[{curated}]")
    assert curate(config(path, tmp_path / "out", *more)) == 0
    assert [record["id"] for record in kept(tmp_path / "out")] == ["0"]
    out = {
        record["id"]: (record["reason"], record["kept"])
        for record in records_of(tmp_path / "out/rejected/dedup")
    }
    where = {"id": old["id"], "source": "news", "against": str(curated)}
    assert out["2"] == ("exact_duplicate", where | {"similarity": 1.0})
    assert out["1"][1].pop("similarity") > 0.8
    assert out["1"] == ("near_duplicate", where)
    assert out["3"][1]["id"] == "0"
    both = ("curation.dedup.bands=20", f"curation.dedup.against=[{curated},{tmp_path / 'out'}]")
    with pytest.raises(ConfigError, match=r"curation\.dedup\.bands=14, and this curation has 20"):
        curate(config(path, tmp_path / "third", *both))
    with pytest.raises(ConfigError, match="is the output of this curation"):
        curate(config(path, curated, *more))


def test_damaged_signatures_are_refused(curated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    for name in ("documents", "signatures"):
        shutil.copytree(curated / name, folder / name)
    dedup = DedupConfig(against=[str(folder)])
    [first, *_] = earlier_parts(dedup, tmp_path / "out")
    index = folder / "signatures" / "index.json"
    for before, after, words in (
        ('"format": 1', '"format": 9', "format 9, not 1"),
        (
            '"name": "part-00000.jsonl"',
            '"name": "../part-00000.jsonl"',
            "parts.0.name is '../part-00000.jsonl'",
        ),
        (f'"documents": {first.n_documents}', '"documents": 4294967295', "part-00000.rows is not a file of"),
    ):
        index.write_text((curated / "signatures" / "index.json").read_text().replace(before, after, 1))
        with pytest.raises(ConfigError, match=re.escape(words)):
            earlier_parts(dedup, tmp_path / "out")
    # An offset that points into the middle of a line, or behind the end.
    collection = Collection(dedup, tmp_path, 0, [first])
    rows = np.fromfile(first.signatures, dtype=row_type(dedup))
    for offset in (3, 1 << 60):
        rows["line_bytes"] = offset
        rows.tofile(first.signatures)
        with pytest.raises(ConfigError, match=r"part-00000\.jsonl"):
            list(collection.lines(np.zeros(1, dtype=np.uint64)))
    index.unlink()
    with pytest.raises(ConfigError, match="holds no signatures"):
        earlier_parts(dedup, tmp_path / "out")


def test_another_recipe_is_refused_until_told(raw_text: Path, curated: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    few = ("executor.workers=1", "curation.stages=[normalize]", "curation.dedup.near=false")
    assert curate(config(raw_text, output, *few)) == 0
    with pytest.raises(ConfigError, match="options differ"):
        curate(config(raw_text, output, *few, "curation.dedup.exact=false"))
    other = tmp_path / "other.jsonl"
    other.write_text(raw_text.read_text(encoding="utf-8") + '{"text": "one more"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="input differ"):
        curate(config(other, output, *few))
    assert curate(config(other, output, *few, "overwrite=true")) == 0
    assert len(kept(output)) == len(documents())  # one is a copy, one is new


@pytest.mark.parametrize("scheme", ["", "file://{}/"])
def test_another_content_of_a_named_file_is_noticed(
    scheme: str, raw_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is named without a folder, or by URL."""
    monkeypatch.chdir(tmp_path)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"text": PROSE[200:330]}) + "\n")
    few = [
        "executor.workers=1",
        "curation.stages=[decontaminate]",
        f"curation.decontaminate.files=['{scheme.format(tmp_path)}questions.jsonl']",
    ]
    few += ["curation.dedup.near=false"]
    assert curate(config(raw_text, tmp_path / "out", *few)) == 0
    out = [stage for stage, _ in rejected(tmp_path / "out").values()]
    assert out.count("decontaminate") == 14  # the reports in English, the copy and the mail
    questions.write_text(
        json.dumps({"text": "When will the committee meet again? Nobody knows it, and nobody asks."}) + "\n"
    )
    with pytest.raises(ConfigError, match=r"\(files differ\)"):
        curate(config(raw_text, tmp_path / "out", *few))


def test_another_content_in_a_folder_of_evaluation_sets_is_noticed(tmp_path: Path) -> None:
    """The files of a folder, and those that a task names, belong to the recipe."""
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu/a.csv").write_text("Why?,a,b,c,d,A\n")
    (tmp_path / "task.yaml").write_text("dataset_path: mmlu\n")
    for entry in ("mmlu", "task.yaml"):
        options = DecontaminateConfig(files=[str(tmp_path / entry)])
        curation = CurationConfig(stages=["decontaminate"], decontaminate=options)
        before = _hashes_of_files(curation)
        assert str(tmp_path / "mmlu/a.csv") in before
        (tmp_path / "mmlu/a.csv").write_text(f"How, {entry}?,a,b,c,d,A\n")
        assert _hashes_of_files(curation) != before


def test_bad_records_are_counted_and_kept_aside(raw_text: Path, tmp_path: Path) -> None:
    dirty = tmp_path / "in"
    dirty.mkdir()
    (dirty / "page.html").write_text("x")
    (dirty / "LICENSE").write_text("x")
    (dirty / "a.dirty.jsonl").write_bytes(
        raw_text.read_bytes() + b'{"text": "no end\n{"no": "text"}\n\xff\xfe\n'
    )
    few = ("executor.workers=1", "curation.stages=[normalize]")
    too_many = (
        r"4 of 71 records cannot be read, more than max_bad_frac=0.001 allows; "
        r"the first: in/a\.dirty\.jsonl:\d+ is no JSON: "
    )
    with pytest.raises(ConfigError, match=too_many):
        curate(config(dirty, tmp_path / "out", *few))
    assert curate(config(dirty, tmp_path / "out", *few, "max_bad_frac=0.1")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    named = {"in/LICENSE": "is no text", "in/page.html": "is of an unknown kind"}
    assert report["unread"] == {"files": 2, "documents": 1, "named": named}
    assert "in/page.html is of an unknown kind" in funnel_table(report)
    bad = [where for where, (stage, _) in rejected(tmp_path / "out").items() if stage == "read"]
    assert len(bad) == 3
    assert all("dirty.jsonl" in where for where in bad)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("unit_bytes=0", "unit_bytes=0 must be 1 or more"),
        ("curation.stages=[normalise]", "known are normalize, language"),
        ("curation.dedup.bands=0", "curation.dedup.bands=0 must be 1 or more"),
        ("max_bad_frac=2", "max_bad_frac=2"),
    ],
)
def test_wrong_options_are_one_sentence(more: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path / "x.jsonl", tmp_path / "out", more)


def test_a_folder_of_something_else_is_refused(raw_text: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"output=.* is not empty"):
        curate(config(raw_text, tmp_path))


def test_one_command_makes_the_corpus_and_its_card(raw_text: Path, tmp_path: Path) -> None:
    more = ("executor.workers=1", f"corpus={tmp_path / 'corpus'}", "prepare.tokenizer.vocab_size=2000")
    for _ in range(2):  # the second time, all is there
        assert curate(config(raw_text, tmp_path / "out", *more, "prepare.workers=1")) == 0
    manifest = load_manifest(tmp_path / "corpus" / "manifest.json")
    heldout = load_manifest(tmp_path / "corpus" / "heldout" / "manifest.json")
    assert manifest.n_documents + heldout.n_documents == len(kept(tmp_path / "out"))
    assert {source.name for source in manifest.sources} >= {"code"}
    card = (tmp_path / "corpus" / "README.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert funnel_table(report) in card
    assert "personal data and unfit text were not looked for" not in card
    lineage = json.loads((tmp_path / "corpus" / "prepare.json").read_text(encoding="utf-8"))["curations"]
    assert lineage == {"out": report["recipe"]}
    # As if prepared by hand.
    by_hand = PrepareConfig(
        input=[str(tmp_path / "out" / "documents")],
        output=str(tmp_path / "corpus"),
        tokenizer=TokenizerConfig(vocab_size=2000),
    )
    assert prepare(by_hand) == 0


def test_a_file_of_bad_lines_takes_little_memory(tmp_path: Path) -> None:
    """Each line of two bytes is told with its place, which is much longer."""
    (tmp_path / "a.jsonl").write_bytes(b"1\n" * 30_000)
    layout, units = Layout(tmp_path / "work"), units_of([str(tmp_path / "a.jsonl")], 1 << 30)
    task = CleanTask(units, ReadConfig(), CurationConfig(stages=[]), layout)
    (tmp_path / "work").mkdir()
    tracemalloc.start()
    task.run(0, TaskProgress(tmp_path / "progress"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with gzip.open(layout.rejected / "read" / "00000.jsonl.gz", "rt") as lines:
        assert sum("is a JSON int, no object" in line for line in lines) == 30_000
    assert peak < 2 << 20
