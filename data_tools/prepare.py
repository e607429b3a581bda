"""Prepare a corpus: python -m data_tools.prepare input=[PATH,...] output=DIR [KEY=VALUE ...]

Reads text (JSONL, plain text, Parquet, tars of text, folders of them, or `input=[python]` for the code and
documentation that every machine has); with `format=chat`, dialogues; with `format=labeled`, texts with labels. Cleans
it, holds out some documents for evaluation, trains a tokenizer, tokenizes in parallel, and writes token shards, a
manifest and a card. Run again after an interruption, it continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script, which works in every folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.command import begin

begin(__name__)

import os
import shutil
from typing import Any

from data_tools.building.encode import WorkerDiedError, encode_parts, take_out
from data_tools.building.gather import Gathered, gather, is_known
from data_tools.building.import_tokenizer import chat_template_of, import_tokenizer
from data_tools.building.lineage import curation_lineage, preparation_lineage
from data_tools.building.pack import pack
from data_tools.building.vocabulary import train_tokenizer
from data_tools.building.workspace import (
    Recipe,
    check_places,
    is_finished,
    make_recipe,
    open_work,
    publish,
    remove_work,
    write_problem,
    write_report,
)
from data_tools.config import CardConfig, PrepareConfig
from data_tools.names import (
    CARD_NAME,
    CORPUS_FOLDER,
    HELDOUT_FOLDER,
    HELDOUT_TEXT,
    REPORT_NAME,
    STATISTICS_NAME,
)
from data_tools.reading.listing import LeftOut, print_left_out
from data_tools.reading.sources import find_files
from data_tools.report.card import HEADERS, describe, packing_line, source_rows
from data_tools.report.fertility import heldout_texts, measure
from data_tools.report.funnel import curations_of, funnel_table
from data_tools.report.schemas import read_prepare_report
from data_tools.report.statistics import corpus_figures, drop_figures, to_text
from data_tools.tables import plain_table, shown
from pretrain.config import run_command
from pretrain.corpus.chat_template import CHAT_TEMPLATE_NAME
from pretrain.corpus.manifest import MANIFEST_NAME, Manifest, load_manifest
from pretrain.corpus.tokenizer import SENTENCEPIECE_NAME, Tokenizer, tokenizer_in
from pretrain.errors import ConfigError
from pretrain.files import write_atomically
from pretrain.printing import print_error, visible

_SOURCES_SHOWN = 12


def prepare(config: PrepareConfig) -> int:
    """Prepare a corpus from text. Returns the exit code."""
    try:
        return _prepare(config)
    except WorkerDiedError as error:
        print_error("error", error)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from here", file=sys.stderr)
        return 130
    except OSError as error:
        print_error("error", write_problem(config.output, error))
        return 1


def _prepare(config: PrepareConfig) -> int:
    check_places(config)
    output = Path(config.output).expanduser().resolve()
    given = import_tokenizer(config.tokenizer) if config.tokenizer.path is not None else None
    left_out: list[LeftOut] = []
    files = find_files(config, left_out.extend)
    print_left_out(left_out)
    template = chat_template_of(config)
    recipe = make_recipe(config, files, given.sha256 if given is not None else None, template)
    if is_finished(output, recipe, config.overwrite):
        remove_work(output)
        _state_anew(config, output)
        print(f"already prepared: {output / MANIFEST_NAME} was made from this input with these options")
        return 0
    with open_work(output, recipe) as work:
        corpus = work / CORPUS_FOLDER
        if not (work / "packed").exists():
            gathered = gather(config, files, work, left_out)
            model = work / (given.file_name if given is not None else SENTENCEPIECE_NAME)
            if not model.exists() and given is not None:
                write_atomically(model, given.content)
            elif not model.exists():
                train_tokenizer(config.tokenizer, gathered, work, model)
            if template is not None:
                write_atomically(work / CHAT_TEMPLATE_NAME, template.encode())
            chat = config.chat if template is not None else None
            left_out_dialogues = encode_parts(
                gathered, work, model, _n_workers(config), chat, config.labels.max_tokens
            )
            take_out(config, gathered, left_out_dialogues)
            _build(config, recipe, gathered, work, corpus)
            write_atomically(work / "packed", b"")
        publish(corpus, output)
    _report(output)
    return 0


def _n_workers(config: PrepareConfig) -> int:
    return config.workers or len(os.sched_getaffinity(0))


def _build(config: PrepareConfig, recipe: Recipe, gathered: Gathered, work: Path, corpus: Path) -> None:
    """Write the finished corpus, with its card, statistics and report, into `corpus`."""
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir()
    model = tokenizer_in(work)
    for path in (model, work / CHAT_TEMPLATE_NAME):
        if path.exists():
            write_atomically(corpus / path.name, path.read_bytes())
    tokenizer = Tokenizer.trusted(corpus / model.name)
    try:
        manifest, heldout, counts = pack(config, gathered, work, corpus, tokenizer)
    except OSError:  # on a full disk, half-written files would only keep it full
        shutil.rmtree(corpus, ignore_errors=True)
        raise
    kind = f"sentencepiece {config.tokenizer.model_type.value}"
    if config.tokenizer.path is not None:
        kind = f"{'sentencepiece' if tokenizer.is_sentencepiece else 'Hugging Face'}, imported"
    fits: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    if heldout is not None:  # measured on text that the tokenizer was not trained on
        fits = measure(tokenizer, heldout_texts(corpus / HELDOUT_FOLDER / HELDOUT_TEXT))
    curations = curations_of(config.input)
    reports = [report for _, report in curations]
    statistics = corpus_figures(manifest, heldout, counts)
    statistics |= drop_figures(reports, len(config.input), gathered.funnel)
    write_atomically(corpus / STATISTICS_NAME, to_text(statistics))
    lineage = [stage for name, report in curations for stage in curation_lineage(name, report)]
    report = {
        "recipe": {"options": recipe.options, "input": recipe.input},
        "created_by": manifest.created_by,
        "root_sha256": manifest.root_sha256,
        "card": config.card.stated(),
        "funnel": gathered.funnel.as_dict(),
        "curations": {name: report["recipe"] for name, report in curations},
        "curation_funnels": [funnel_table(report) for report in reports],
        "tokenizer": {
            "sha256": manifest.tokenizer_sha256,
            "kind": kind,
            "heldout_fit": fits[0],
            "heldout_fit_by_language": fits[1],
            **_sample_figures(config, gathered),
        },
        "lineage": lineage + preparation_lineage(recipe, gathered, work, manifest, heldout),
        "summary": gathered.funnel.lines(),
    }
    describe(corpus, report)
    write_report(corpus, report)


def _sample_figures(config: PrepareConfig, gathered: Gathered) -> dict[str, Any]:
    """The sample that the tokenizer was trained on; empty where it was imported."""
    if config.tokenizer.path is not None:
        return {}
    names = [name for name, _ in gathered.sources]
    sizes = [sample.text_bytes for sample in gathered.sample]
    return {
        "sample_bytes": gathered.sample_bytes,
        "sample_bytes_by_source": dict(zip(names, sizes, strict=True)),
    }


def _state_anew(config: PrepareConfig, output: Path) -> None:
    """Rewrite the card of a finished corpus where the statements in card.* have changed."""
    report = read_prepare_report(output / REPORT_NAME)
    unknown = [s.name for s in load_manifest(output / MANIFEST_NAME).sources if not is_known(s.license)]
    if config.card.required and unknown:
        names = ", ".join(map(shown, unknown[:5]))
        raise ConfigError(
            f"card.required=true, and output={output} has sources of unknown license: {names}; "
            "prepare it again with license=NAME, or with the field license in the records"
        )
    stated = config.card.stated()
    if stated == report.get("card", CardConfig().stated()):
        return
    if not (output / STATISTICS_NAME).exists():
        raise ConfigError(
            f"output={output} was prepared by an older program, without {STATISTICS_NAME}; to state card.*, prepare "
            "it again with overwrite=true"
        )
    report["card"] = stated
    describe(output, report)
    write_report(output, report)
    print(f"written anew: {output / CARD_NAME}")


def _report(output: Path) -> None:
    """Print a summary of the corpus on stdout."""
    manifest: Manifest = load_manifest(output / MANIFEST_NAME)
    summary = read_prepare_report(output / REPORT_NAME)["summary"]
    print("\n".join(map(visible, summary)))
    print()
    print(plain_table(source_rows(manifest, _SOURCES_SHOWN), HEADERS))
    print(
        f"\n{manifest.document_tokens:,} tokens of a vocabulary of {manifest.vocab_size:,} in "
        f"{manifest.n_chunks:,} chunks of {manifest.chunk_tokens:,}"
    )
    if manifest.loss_mask:
        print(packing_line(manifest))
    print(f"corpus: {output / MANIFEST_NAME}")


if __name__ == "__main__":
    run_command(PrepareConfig, prepare, doc=__doc__)
