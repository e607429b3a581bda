"""Score held-out text and tasks: `python launch/eval.py run_dir=DIR input=[PATH,...] tasks=[FILE,...] output=DIR`

For text, prints the loss, perplexity and bits per byte of each source and of all text. A model trained with
objective=mlm is scored on masked tokens, the same at each call, and has no bits per byte. An input is a file or folder
of text as for data_tools.prepare (.jsonl, .jsonl.gz, .parquet, .txt, .md, .tar), or a prepared corpus (its folder or
manifest.json). A task is a file that says what the model is asked and what is right (docs/evaluation.md); each score
stands beside its standard error. `output=DIR` gets a file for each task and one for the text, with a record of each
item, which launch/compare.py reads. A classifier is scored on texts with labels instead (docs/classification.md). With
json=true the last line on stdout is the result as JSON.
Exit codes: 0 done, 2 the input or configuration is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="output= has the results of what was finished")

from omegaconf import MISSING

from pretrain.config import Precision, Weights, Which, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.printing import say, shown, visible

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from pretrain.corpus.labels import LabeledDocument
    from pretrain.corpus.shards import Corpus
    from pretrain.evaluate.heldout import HeldOutResult, TokenDocument
    from pretrain.evaluate.results import ItemResult, Results
    from pretrain.evaluate.tasks.questions import Question, Unscored
    from pretrain.evaluate.tasks.running import Outcome
    from pretrain.evaluate.tasks.task import Task
    from pretrain.model.decoder import Decoder
    from pretrain.trained import TrainedModel

MANIFEST = "manifest.json"
TEXT_TASK = "text"
"""Name of the results of text, beside those of tasks."""
SHOWN_UNSCORED = 3
MAX_CHARS = 1 << 40  # documents of any length are scored


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What to score, and how."""

    run_dir: PathText = MISSING
    """Folder of the run whose model is scored."""
    input: list[PathText] = field(default_factory=list)
    """Files or folders of text, or prepared corpora."""
    tasks: list[PathText] = field(default_factory=list)
    """Task files."""
    output: PathText | None = None
    """Folder for the files of results. Files of the same name are replaced."""
    step: int | None = None
    """Step of the checkpoint to use; null means the one that `which` says."""
    which: Which = Which.newest
    """Checkpoint to use where no step is given: `newest`, or `best`, the one with the lowest held-out loss."""
    weights: Weights = Weights.trained
    """Weights to use: `trained`, or `ema`, their moving average (ema.decay)."""
    checkpoint_target: PathText | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    max_documents: int | None = None
    """Number of documents to score from the start of each input; null scores all of them."""
    max_tokens: int | None = None
    """Number of tokens to score from the start of each input; null scores all of them. The document that reaches the
    limit is cut there, and its bytes count in proportion. The documents of a prepared corpus are shuffled, so its start
    is a fair sample."""
    sequence_length: int | None = None
    """Context of the model in tokens; null means the one used in training."""
    micro_batch_sequences: int = 8
    """Number of windows of text per forward pass."""
    precision: Precision = Precision.auto
    """Precision of the computation. `auto` means bf16 where the device computes it in hardware, and fp32 otherwise."""
    max_items: int | None = None
    """Number of items to score of each task, drawn at random but the same at each call; null scores all of them."""
    corpus: PathText | None = None
    """Folder of the training corpus, in which the text of the tasks' items is looked for."""
    chat: bool = False
    """Put the tasks' prompts as what the user says in a dialogue, for a model that was trained on dialogues."""
    temperature: float = 0.0
    """Number by which the logits are divided when the model writes an answer; 0 always chooses the most probable
    token."""
    seed: int = 0
    """Seed of the sampling of answers, and of the resampling for standard errors."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    label_field: str = "label"
    """Field or column that holds the label of a text, for a classifier."""
    json: bool = False
    """Print the result as JSON on the last line of stdout."""

    def __post_init__(self) -> None:
        if not self.input and not self.tasks:
            raise ConfigError("input=[] and tasks=[] are empty; give input=[PATH,...] or tasks=[FILE,...]")
        if self.tasks and self.output is None:
            raise ConfigError("tasks= needs a folder for the results; give output=DIR")
        if self.corpus is not None and not self.tasks:
            raise ConfigError(
                "corpus= is where the text of tasks is looked for; give tasks=[FILE,...] as well"
            )
        for name in ("max_documents", "max_tokens", "sequence_length", "micro_batch_sequences", "max_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be greater than 0")


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    trained: TrainedModel
    model: Decoder
    device: torch.device
    precision: Precision


@dataclass
class Work:
    """The documents of all inputs, and the size of their text in bytes, for the progress display."""

    documents: list[Iterator[TokenDocument]]
    text_bytes: int


def main(config: EvalConfig) -> None:
    """Check the tasks, load the model, score text and tasks, and print the tables."""
    from pretrain.device import own_device
    from pretrain.evaluate.results import as_json as summary
    from pretrain.model.kernels import DTYPES
    from pretrain.trained import load_trained, precision_on

    for entry in config.input:
        if not Path(entry).expanduser().exists():
            raise ConfigError(f"input={entry} does not exist")
    asked = read_tasks(config)
    trained = load_trained(
        config.run_dir, config.step, config.checkpoint_target, which=config.which, weights=config.weights
    )
    is_classifier = bool(trained.config.model.classes)
    if is_classifier:
        check_classifier(config, trained)
    if asked and not trained.config.causal:
        raise ConfigError(
            f"tasks=: the model of run_dir={config.run_dir} was trained with objective=mlm, which fills masks and "
            "answers no questions"
        )
    if config.output is not None:
        make_folder(Path(config.output).expanduser())
    device = own_device()
    precision = precision_on(device, config.precision)
    loaded = Loaded(trained, trained.decoder(device, DTYPES[precision]), device, precision)
    said: dict[str, Any] = {}
    if config.input:
        said = score_classifier(config, loaded) if is_classifier else score_text(config, loaded)
    if asked:
        found = score_tasks(config, loaded, asked)
        print_tasks(found)
        said |= {"tasks": {results.task: summary(results) for results in found}}
    if config.json:
        print(json.dumps({**facts(config, loaded), **said}))


def facts(config: EvalConfig, loaded: Loaded) -> dict[str, Any]:
    """What the results belong to."""
    trained = loaded.trained
    known = {"run_dir": config.run_dir, "step": trained.step, "tokens_seen": trained.tokens_seen}
    return known | {"precision": loaded.precision.value}


# ---- text ------------------------------------------------------------------------------------------------------------


def score_text(config: EvalConfig, loaded: Loaded) -> dict[str, Any]:
    """Score all inputs, print the table, and write the record of each document. Returns what the JSON says of them."""
    import numpy as np

    from data_tools.progress import stage
    from pretrain.data.masking import Masking
    from pretrain.evaluate.heldout import score_documents
    from pretrain.evaluate.results import Results, document_result, scored

    trained = loaded.trained
    masking = None
    if not trained.config.causal:
        masking = Masking.of(trained.config.mlm, trained.config.seed, trained.tokenizer)
    work = find_documents(config, trained)
    documents = (document for documents in work.documents for document in documents)
    records: list[ItemResult] = []

    def keep(document: TokenDocument, nll_sum: float, n_predicted: int) -> None:
        if config.output is not None and n_predicted:
            records.append(document_result(document, nll_sum, n_predicted, of_all_text=masking is None))

    with stage("evaluating", work.text_bytes) as progress:
        result = score_documents(
            loaded.model,
            documents,
            sequence_length=config.sequence_length or trained.sequence_length,
            micro_batch_sequences=config.micro_batch_sequences,
            device=loaded.device,
            progress=lambda document: progress.advance(document.text_bytes),
            masking=masking,
            on_scores=keep,
        )
    if config.output is not None:
        statistics = {name: np.array([r.statistics[name] for r in records]) for name in records[0].statistics}
        write_results(
            Results(
                **results_head(config, loaded),
                task=TEXT_TASK,
                kind="text",
                task_sha256="",
                n_examples=0,
                main="bits_per_byte" if masking is None else "loss",
                scores=scored(statistics, config.seed),
                items=records,
            ),
            config.output,
        )
    print_table(result, trained, config, loaded.precision)
    return as_json(result, config)


def find_documents(config: EvalConfig, trained: TrainedModel) -> Work:
    """The documents to score, tokenized while they are read. Raises ConfigError for an empty or unsuitable input."""
    from pretrain.evaluate.heldout import first_tokens

    work = Work([], 0)
    for entry in config.input:
        path = Path(entry).expanduser()
        corpus = path / MANIFEST if (path / MANIFEST).is_file() else path
        documents, text_bytes = (
            read_corpus(corpus, trained) if corpus.name == MANIFEST else read_text(entry, config, trained)
        )
        documents = islice(documents, config.max_documents)
        if config.max_tokens is not None:
            documents = first_tokens(documents, config.max_tokens)
        work.documents.append(documents)
        work.text_bytes += text_bytes
    return work


def read_corpus(manifest: Path, trained: TrainedModel) -> tuple[Iterator[TokenDocument], int]:
    """The documents of a prepared corpus and the size of their text."""
    from pretrain.corpus.shards import Corpus
    from pretrain.evaluate.heldout import corpus_documents

    corpus = Corpus(manifest)
    check_tokenizer(corpus, trained)
    return corpus_documents(corpus), sum(source.text_bytes for source in corpus.manifest.sources)


def check_tokenizer(corpus: Corpus, trained: TrainedModel) -> None:
    """Raise ConfigError where a corpus was prepared with another tokenizer, or is labeled and the model is not."""
    manifest = corpus.manifest
    if (manifest.tokenizer_sha256, manifest.vocab_size) != (
        trained.tokenizer.sha256,
        trained.tokenizer.vocab_size,
    ):
        raise ConfigError(
            f"input={corpus.manifest_path} was prepared with a different tokenizer than run_dir was trained with; "
            "give the text itself, or prepare it with tokenizer.path=run_dir"
        )
    if manifest.classes and not trained.config.model.classes:
        raise ConfigError(
            f"input={corpus.manifest_path} has labeled documents, and run_dir was not trained with objective=classify; "
            "give the text itself"
        )


def read_text(entry: str, config: EvalConfig, trained: TrainedModel) -> tuple[Iterator[TokenDocument], int]:
    """The documents of text files and the size of their text."""
    import numpy as np

    from data_tools.config import PrepareConfig
    from data_tools.reading.sources import Rejected, find_files, read_documents
    from data_tools.text import clean
    from pretrain.evaluate.heldout import TokenDocument
    from pretrain.evaluate.results import hash_of

    options = PrepareConfig(input=[entry], output="", text_field=config.text_field, max_chars=MAX_CHARS)

    def texts() -> Iterator[tuple[str, str, str]]:
        for file in find_files(options):
            for found in read_documents(file, options):
                if isinstance(found, Rejected):
                    raise ConfigError(f"input={entry}: {found.where} ({found.reason})")
                for (source, _), document_id, text in zip(found.sources, found.ids, found.texts, strict=True):
                    if cleaned := clean(text):  # the form in which the model has seen text
                        yield source, document_id, cleaned

    found = list(islice(texts(), config.max_documents))
    if not found:
        raise ConfigError(f"input={entry} holds no text")
    documents = (
        TokenDocument(
            source,
            np.array(trained.tokenizer.encode_document(text)),
            len(text.encode()),
            id=document_id,
            text_hash=hash_of(text.encode()),
        )
        for source, document_id, text in found
    )
    return documents, sum(len(text.encode()) for _, _, text in found)


def results_head(config: EvalConfig, loaded: Loaded) -> dict[str, Any]:
    """What every file of results begins with; a task replaces what it knows better."""
    from pretrain.evaluate.results import FORMAT

    empty = {"truncated": 0, "empty": 0, "unscored": []}
    return {"format": FORMAT, **facts(config, loaded), "chat": config.chat, **empty}


def make_folder(folder: Path) -> None:
    """Make the folder of results, before hours of work. Raises ConfigError where something else has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"output={folder} is not a folder; give another name") from error


def write_results(results: Results, output: str) -> None:
    """Write the results of one task into the folder of results."""
    results.write(Path(output).expanduser() / f"{results.task}.json")


def print_table(
    result: HeldOutResult, trained: TrainedModel, config: EvalConfig, precision: Precision
) -> None:
    """The scores of each source, and of all together."""
    from rich.table import Table
    from rich.text import Text

    title = f"step {trained.step}, {trained.tokens_seen:,} tokens seen, computed in {precision.value}"
    bounds = {"documents": config.max_documents, "tokens": config.max_tokens}
    given = [f"{bound:,} {unit}" for unit, bound in bounds.items() if bound is not None]
    caption = f"of each input at most {' and '.join(given)}" if given else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("source")
    for name in ("loss", "perplexity", "bits/byte", "tokens", "bytes", "documents"):
        table.add_column(name, justify="right")
    rows = list(result.sources.items())
    for number, (name, scores) in enumerate([*rows, ("all", result.overall)], 1):
        bits = "" if scores.bits_per_byte is None else f"{scores.bits_per_byte:.4f}"
        numbers = (f"{scores.loss:.4f}", f"{scores.perplexity:,.2f}", bits)
        counts = (f"{scores.tokens:,}", f"{scores.text_bytes:,}", f"{scores.documents:,}")
        table.add_row(Text(visible(name, limit=200)), *numbers, *counts, end_section=number == len(rows))
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table. A narrow terminal wraps lines; nothing is cut."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.width = max(console.width, console.measure(table).minimum)
    console.print(table)


def as_json(result: HeldOutResult, config: EvalConfig) -> dict[str, Any]:
    """What the last line of output says of text with json=true."""
    return {
        "max_documents": config.max_documents,
        "max_tokens": config.max_tokens,
        **result.overall.as_dict(),
        "sources": {name: scores.as_dict() for name, scores in result.sources.items()},
    }


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A task, its questions, and what is known before the model answers."""

    task: Task
    questions: list[Question]
    unscored: list[Unscored]
    in_corpus: dict[str, bool | None] = field(default_factory=dict)
    """Whether the training corpus holds text of an item, by its id, where this was looked for."""


def read_tasks(config: EvalConfig) -> list[Asked]:
    """The tasks and their questions. Raises ConfigError for a wrong file, before a model is loaded."""
    from data_tools.text import clean
    from pretrain.evaluate.tasks.questions import questions_of
    from pretrain.evaluate.tasks.running import check_packages
    from pretrain.evaluate.tasks.task import load_task

    found: list[Asked] = []
    for path in config.tasks:
        task = load_task(path)
        if task.name in (TEXT_TASK, *(asked.task.name for asked in found)):
            raise ConfigError(
                f"tasks={path} has the name {task.name}, which is taken; give it another with name:"
            )
        check_packages(task)
        found.append(Asked(task, *questions_of(task, clean, config.max_items)))
    if config.corpus is not None:
        look_in_corpus(found, config.corpus)
    return found


def look_in_corpus(found: list[Asked], corpus: str) -> None:
    """Look for the text of all items in the training corpus, which is read once."""
    from data_tools.progress import stage
    from data_tools.stages.decontamination.runs import blocks, runs
    from pretrain.evaluate.tasks.overlap import Wanted, open_corpus, texts_of

    wanted = Wanted([question.texts for asked in found for question in asked.questions], runs)
    opened, tokenizer = open_corpus(Path(corpus).expanduser())
    total_bytes = sum(source.text_bytes for source in opened.manifest.sources)
    with stage(f"looking for the tasks' text in {corpus}", total_bytes) as progress:
        for block in blocks(texts_of(opened, tokenizer)):
            for key, hashes in runs(block, wanted.keys).items():
                wanted.look_in(key, hashes)
            progress.advance(len(block.encode()))
    answers = iter(wanted.in_corpus())
    for asked in found:
        asked.in_corpus = {question.id: next(answers) for question in asked.questions}


def score_tasks(config: EvalConfig, loaded: Loaded, found: list[Asked]) -> list[Results]:
    """Put all tasks to the model, and write the results of each as soon as it has them."""
    from data_tools.progress import stage
    from data_tools.text import clean
    from pretrain.evaluate.tasks.running import Subject, ask, text_bytes
    from pretrain.generation.sampling import Sampling

    assert config.output is not None
    trained = loaded.trained
    subject = Subject(
        model=loaded.model,
        tokenizer=trained.tokenizer,
        sequence_length=config.sequence_length or trained.sequence_length,
        micro_batch_sequences=config.micro_batch_sequences,
        device=loaded.device,
        clean=clean,
        sampling=Sampling(temperature=config.temperature),
        seed=config.seed,
        chat=trained.chat() if config.chat else None,
    )
    all_results = []
    for asked in found:
        with stage(asked.task.name, sum(map(text_bytes, asked.questions))) as progress:
            outcome = ask(asked.task, asked.questions, subject, progress.advance)
        results = results_of(config, loaded, asked, outcome)
        write_results(results, config.output)
        all_results.append(results)
    return all_results


def results_of(config: EvalConfig, loaded: Loaded, asked: Asked, outcome: Outcome) -> Results:
    """The file of results of a task."""
    from pretrain.evaluate.results import Overlap, Results, UnscoredItem, records, scored

    task = asked.task
    in_corpus = (
        [asked.in_corpus.get(question.id) for question in outcome.questions] if config.corpus else None
    )
    overlap = None
    if in_corpus is not None:
        known = [hit for hit in in_corpus if hit is not None]
        overlap = Overlap(
            corpus=str(config.corpus),
            items=len(known),
            found=sum(known),
            too_short=len(in_corpus) - len(known),
        )
    details = outcome.by_label or {"labels": {}, "confusion_matrix": []}
    return Results(
        **results_head(config, loaded)
        | {
            "truncated": outcome.truncated,
            "empty": outcome.empty,
            "unscored": [UnscoredItem(**item._asdict()) for item in (*asked.unscored, *outcome.unscored)],
        },
        task=task.name,
        kind=task.kind.value,
        task_sha256=task.sha256,
        n_examples=task.n_examples,
        main=next(iter(outcome.statistics)),
        scores=scored(outcome.statistics, config.seed),
        items=records(
            [(question.id, question.hash) for question in outcome.questions],
            outcome.statistics,
            outcome.predictions,
            outcome.expected,
            in_corpus,
        ),
        overlap=overlap,
        by_label=details["labels"],
        confusion_matrix=details["confusion_matrix"],
    )


def print_tasks(found: list[Results]) -> None:
    """A row for each score of each task, and what is to be known beside it."""
    from rich.table import Table
    from rich.text import Text

    table = Table("task", "score", title="tasks", title_justify="left")
    for name in ("value", "± standard error", "items", "in corpus"):
        table.add_column(name, justify="right")
    for results in found:
        n_unscored = f" (-{len(results.unscored):,})" if results.unscored else ""
        overlap = (
            "" if results.overlap is None or not results.overlap.items else f"{results.overlap.share:.1%}"
        )
        rows = list(results.scores.items())
        for number, (name, score) in enumerate(rows):
            error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
            task = Text(shown(results.task) if number == 0 else "")
            counts = (f"{len(results.items):,}{n_unscored}", overlap)
            table.add_row(
                task, name, f"{score.value:.4f}", error, *counts, end_section=number == len(rows) - 1
            )
    print_whole(table)
    for results in found:
        for line in notes_on(results):
            say(f"{results.task}: {line}")


def notes_on(results: Results) -> list[str]:
    """What has to be known beside the scores of a task, and is not usual."""
    notes = []
    if results.unscored:
        first = "; ".join(f"{item.id!r} {item.reason}" for item in results.unscored[:SHOWN_UNSCORED])
        n_items = len(results.items) + len(results.unscored)
        more = "; ..." if len(results.unscored) > SHOWN_UNSCORED else ""
        notes.append(f"no score has {len(results.unscored):,} of {n_items:,} items: {first}{more}")
    if results.truncated:
        notes.append(
            f"the beginning of {results.truncated:,} prompts was cut off, since they are longer than the model reads; "
            "fewer or shorter examples would help"
        )
    if results.empty:
        notes.append(f"{results.empty:,} of {len(results.items):,} answers are empty")
    if results.overlap is not None and results.overlap.too_short:
        notes.append(f"{results.overlap.too_short:,} items are too short to be looked for in the corpus")
    return notes


# ---- classifiers -----------------------------------------------------------------------------------------------------


def score_classifier(config: EvalConfig, loaded: Loaded) -> dict[str, Any]:
    """Put every document of all inputs into a class, and print the scores. Returns what the JSON says of them."""
    import numpy as np

    from data_tools.progress import stage
    from pretrain.corpus.labels import beginning
    from pretrain.evaluate.classifier import class_probabilities
    from pretrain.evaluate.classifier_scores import classifier_scores

    trained = loaded.trained
    documents = [document for entry in config.input for document in read_labeled(entry, config, trained)]
    kept = [beginning(d.tokens, trained.sequence_length, trained.tokenizer.eos_id) for d in documents]
    with stage("classifying", sum(document.text_bytes for document in documents)) as progress:
        probabilities = class_probabilities(
            loaded.model,
            kept,
            micro_batch_sequences=config.micro_batch_sequences,
            device=loaded.device,
            progress=lambda rows: progress.advance(sum(documents[row].text_bytes for row in rows)),
        )
    labels = np.array([document.label for document in documents])
    scores = classifier_scores(labels, probabilities, trained.config.model.classes)
    scores["cut_documents"] = sum(len(k) < len(d.tokens) for k, d in zip(kept, documents, strict=True))
    print_classes(
        scores,
        f"step {trained.step}, {trained.tokens_seen:,} tokens seen, computed in {loaded.precision.value}",
    )
    return scores


def check_classifier(config: EvalConfig, trained: TrainedModel) -> None:
    """Raise ConfigError for options that a classifier has no use for."""
    from pretrain.evaluate.classifier_scores import require_scikit_learn

    require_scikit_learn()
    if config.tasks or config.output is not None:
        raise ConfigError(
            f"tasks={config.tasks} and output={config.output}: the model of run_dir={config.run_dir} was trained with "
            "objective=classify, which answers no questions; give input=[PATH,...] with labels alone"
        )
    if config.max_tokens is not None:
        raise ConfigError(
            f"max_tokens={config.max_tokens} would cut documents of a classifier; give max_documents"
        )
    if config.sequence_length not in (None, trained.sequence_length):
        raise ConfigError(
            f"sequence_length={config.sequence_length}: the classifier of run_dir={config.run_dir} reads the first "
            f"{trained.sequence_length} tokens of a document, as in training; leave it out"
        )


def read_labeled(entry: str, config: EvalConfig, trained: TrainedModel) -> list[LabeledDocument]:
    """The documents of an input with their classes. Raises ConfigError for an unsuitable one."""
    import numpy as np

    from data_tools.reading.labeled import labeled_texts
    from pretrain.corpus.labels import LabeledDocument, labeled_documents
    from pretrain.corpus.shards import Corpus

    path, classes = Path(entry).expanduser(), trained.config.model.classes
    manifest = path / MANIFEST if (path / MANIFEST).is_file() else path
    if manifest.name == MANIFEST:
        corpus = Corpus(manifest)
        check_tokenizer(corpus, trained)
        if corpus.manifest.classes != classes:
            raise ConfigError(
                f"input={manifest} has the classes {', '.join(corpus.manifest.classes) or 'none'}, and run_dir="
                f"{config.run_dir} was trained with {', '.join(classes)}; give the texts with their labels, or prepare "
                f"them with labels.classes=[{','.join(classes)}]"
            )
        return list(islice(labeled_documents(corpus), config.max_documents))
    found = labeled_texts(entry, classes, text_field=config.text_field, label_field=config.label_field)
    texts = list(islice(found, config.max_documents))
    if not texts:
        raise ConfigError(f"input={entry} holds no text")
    encode, numbers = trained.tokenizer.encode_document, {name: at for at, name in enumerate(classes)}
    return [
        LabeledDocument(np.array(encode(text)), numbers[label], len(text.encode())) for text, label in texts
    ]


def print_classes(scores: dict[str, Any], title: str) -> None:
    """The scores of each class with its row of the confusion matrix, and those of all documents."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("class")
    for name in ("precision", "recall", "F1", "documents"):
        table.add_column(name, justify="right")
    for name in scores["classes"]:
        table.add_column(Text(f"taken for {visible(name, limit=20)}"), justify="right")
    rows = zip(scores["classes"].items(), scores["confusion_matrix"], strict=True)
    for at, ((name, of_class), row) in enumerate(rows, 1):
        figures = [f"{of_class[key]:.4f}" for key in ("precision", "recall", "f1")]
        counts = [f"{count:,}" for count in (of_class["documents"], *row)]
        table.add_row(
            Text(visible(name, limit=40)), *figures, *counts, end_section=at == len(scores["classes"])
        )
    macro = [f"{scores[f'macro_{key}']:.4f}" for key in ("precision", "recall", "f1")]
    table.add_row("all (macro)", *macro, f"{scores['documents']:,}")
    table.caption = (
        f"accuracy {scores['accuracy']:.4f}, log loss {scores['log_loss']:.4f}, Brier score {scores['brier']:.4f}, "
        f"calibration error {scores['ece']:.4f}; {scores['cut_documents']:,} documents were cut to their start"
    )
    print_whole(table)


if __name__ == "__main__":
    sys.argv[1:] = ["json=true" if argument == "--json" else argument for argument in sys.argv[1:]]
    run_command(EvalConfig, main, doc=__doc__)
