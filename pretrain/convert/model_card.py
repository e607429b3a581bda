"""The model card of an export: README.md, with where each figure comes from.

Every figure is `measured` (by this program, on this run), `counted` (it follows from files or configuration), `stated`
(by whoever made the corpus) or `estimated`, with the formula. What is not known is said to be unknown. Names and
licenses come from manifests, which may be anyone's, so they are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import __version__
from pretrain.arithmetic import count_parameters, flops_per_token
from pretrain.convert.form import Form, Format, Stored
from pretrain.convert.heldout_loss import FormLoss
from pretrain.convert.hugging_face import Parity
from pretrain.corpus.manifest import CorpusSource, load_manifest
from pretrain.errors import ConfigError
from pretrain.gpus import MAX_WATTS
from pretrain.printing import code_span, markdown, markdown_table
from pretrain.reliability.events import Event, read_events
from pretrain.reliability.journal import HELDOUT_PREFIX, read_metrics
from pretrain.remote import is_url
from pretrain.trained import TrainedModel

_MAX_ROWS = 100
_HEADERS = ("figure", "value", "how it is known")


@dataclass(frozen=True)
class CardFacts:
    """What the export itself found out."""

    form: Form
    weight_error: float
    parity: Parity | None
    loss: FormLoss | None
    device_watts: float | None
    """Power of the device of one rank in watts, as the user states it; None takes a GPU's data sheet."""


def model_card(trained: TrainedModel, run_dir: Path, facts: CardFacts) -> str:
    """The text of README.md."""
    sections = [
        ("", _head(trained, facts)),
        ("Data", _data(trained)),
        ("Tokenizer", _tokenizer(trained)),
        ("Architecture", _architecture(trained)),
        ("Compute and energy", _compute(trained, run_dir, facts)),
        ("Evaluation", _evaluation(trained, run_dir, facts)),
        ("Checks of this export", _checks(facts)),
    ]
    texts = [f"## {title}\n\n{text}" if title else text for title, text in sections]
    return "\n\n".join(texts) + "\n"


def _head(trained: TrainedModel, facts: CardFacts) -> str:
    is_gguf, classes = facts.form.format is Format.gguf, trained.config.model.classes
    task, kind = (
        ("text-classification", "SequenceClassification") if classes else ("text-generation", "CausalLM")
    )
    front = "" if is_gguf else f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n\n"
    use = (
        "llama.cpp and programs that build on it read the file; so does "
        "`AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=...)`."
        if is_gguf
        else f"`AutoModelFor{kind}.from_pretrained(FOLDER)` and `AutoTokenizer.from_pretrained(FOLDER)` of "
        "`transformers` load it; no code comes with it, and nothing in it is a pickle."
    )
    if not is_gguf and facts.form.stored is Stored.int8:
        use += " The package `torchao` must be installed."
    if classes:
        use += f" Its classes: {', '.join(map(markdown, classes))}."
    name = "Classifier" if classes else "Language model"
    return (
        f"{front}# {name}, step {trained.step:,}\n\nA decoder-only {name.lower()}, trained with pretrain and "
        f"exported with version {__version__} as {facts.form.name}.\n\n{use}\n\nEach figure below is marked: "
        "*measured* by the program, *counted* in files or settings, *stated* by those who made the corpus, or "
        "*estimated*.\nThe model was not tested for safety, bias or truthfulness; what it writes may be wrong or "
        "harmful."
    )


def _data(trained: TrainedModel) -> str:
    rows: list[tuple[str, ...]] = []
    unknown = []
    for corpus in trained.config.data.corpora():
        found = _sources(corpus.manifest)
        if found is None:
            unknown.append(markdown(corpus.name))
            continue
        found.sort(key=lambda source: (-source.tokens, source.name))
        rows += [
            (markdown(corpus.name), markdown(s.name), f"{s.tokens:,}", markdown(s.license))
            for s in found[:_MAX_ROWS]
        ]
        if len(found) > _MAX_ROWS:
            rest = found[_MAX_ROWS:]
            tokens = sum(source.tokens for source in rest)
            rows.append((markdown(corpus.name), f"{len(rest):,} others", f"{tokens:,}", "see the corpus"))
    seen = f"{trained.tokens_seen:,}"
    text = (
        f"The model saw {seen} tokens (counted, padding and filler included); a corpus may have been read in part, or "
        "several times."
    )
    if rows:
        headers = ("corpus", "source", "tokens in the corpus (counted)", "license (stated)")
        text += "\n\n" + markdown_table(headers, rows)
    if unknown:
        text += f"\n\nNot at hand when this was written, so its sources and licenses are unknown: {', '.join(unknown)}."
    return text


def _sources(manifest: str) -> list[CorpusSource] | None:
    """The sources of a corpus that have documents; None where it is not at hand."""
    if is_url(manifest):
        return None  # a URL that only the run names is not opened
    try:
        return [source for source in load_manifest(manifest).sources if source.documents]
    except ConfigError:
        return None


def _tokenizer(trained: TrainedModel) -> str:
    tokenizer = trained.tokenizer
    kind = "sentencepiece" if tokenizer.is_sentencepiece else "tokenizer.json of the package `tokenizers`"
    return markdown_table(
        _HEADERS,
        [
            ("kind", kind, "counted"),
            ("entries", f"{tokenizer.vocab_size:,}", "counted"),
            (
                "begin, end, padding",
                ", ".join(
                    code_span(tokenizer.piece(i))
                    for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
                ),
                "counted",
            ),
            ("sha256 of its file in the run", code_span(tokenizer.sha256), "counted"),
        ],
    )


def _architecture(trained: TrainedModel) -> str:
    model = trained.config.model
    shape = {
        "parameters": f"{count_parameters(model):,}",
        "blocks": f"{model.n_layers:,}",
        "width": f"{model.d_model:,}",
        "query heads": f"{model.n_heads:,}",
        "key and value heads": f"{model.kv_heads:,}",
        "width of a head": f"{model.head_width:,}",
        "inner width (SwiGLU)": f"{model.d_ff:,}",
        "rows of the embedding": f"{model.vocab_size:,}",
        "embedding and output head are one matrix": "yes" if model.tie_embeddings else "no",
        "queries and keys are normalized": "yes" if model.qk_norm else "no",
        "base of the rotary positions": f"{model.rope_theta:,g}",
        "context in tokens": f"{trained.sequence_length:,}",
        "last trained in": trained.precision.value,
    }
    return markdown_table(_HEADERS, [(name, value, "counted") for name, value in shape.items()])


def _compute(trained: TrainedModel, run_dir: Path, facts: CardFacts) -> str:
    model = trained.config.model
    records, events = _history(run_dir, trained.step)
    hours, devices = _device_hours(records, events)
    flops = sum(
        r["step_tokens"] * flops_per_token(model, r["sequence_length"]) for r in records if _has_tokens(r)
    )
    if len(records) != trained.step:  # steps are missing, so the sum is too
        flops = trained.tokens_seen * flops_per_token(model, trained.sequence_length)
    rows = [
        (
            "training compute",
            f"{flops:.3g} FLOP",
            "estimated: tokens seen x (6 x parameters in matrix products + 12 x blocks x width of all heads x sequence "
            "length), as in PaLM, appendix B",
        )
    ]
    if hours is None:
        rows.append(
            (
                "device hours, device, energy",
                "unknown",
                "the run's metrics and events are not at hand, or not whole",
            )
        )
        return markdown_table(_HEADERS, rows)
    total = sum(hours.values())
    names = ", ".join(sorted({markdown(devices[attempt] or "not in the table of GPUs") for attempt in hours}))
    rows += [
        (
            "device hours",
            f"{total:,.4g}",
            "measured: time of each step x ranks, without saves, evaluations, and work that was lost and repeated",
        ),
        ("device", names, "counted: the run's events"),
        _energy(hours, devices, facts.device_watts),
    ]
    return markdown_table(_HEADERS, rows)


def _energy(
    hours: Mapping[int, float], devices: Mapping[int, str | None], stated: float | None
) -> tuple[str, str, str]:
    watts = {a: stated if stated is not None else MAX_WATTS.get(devices[a] or "") for a in hours}
    known = [hours[attempt] * power for attempt, power in watts.items() if power is not None]
    if len(known) != len(hours):
        return (
            "energy",
            "unknown",
            "the power of the device is not known; device_watts= of the export states it",
        )
    used = ", ".join(
        f"{power:,g} W" for power in sorted({power for power in watts.values() if power is not None})
    )
    source = "as stated at the export" if stated is not None else "the most that its data sheet allows"
    return (
        "energy",
        f"{sum(known) / 1000:,.4g} kWh",
        f"estimated: device hours x {used} ({source}), assuming that power all the time; without hosts, network and "
        "cooling",
    )


def _history(run_dir: Path, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of the steps up to the checkpoint, and the events; empty where the run's files are not at hand."""
    try:
        return [record for record in read_metrics(run_dir) if record["step"] <= step], read_events(run_dir)
    except (ConfigError, OSError):
        return [], []


def _device_hours(
    records: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, float] | None, dict[int, str | None]]:
    """Hours x ranks of each attempt, None where they are not known, and the kind of device of each attempt."""
    ranks: dict[int, int] = {}
    devices: dict[int, str | None] = {}
    for event in events:
        of_attempt: Any = event.get("attempt")
        if event["event"] in (Event.STARTED, Event.RESUMED) and isinstance(event.get("world_size"), int):
            ranks[of_attempt] = event["world_size"]
        if event["event"] == Event.MONITORING:
            label = str(event.get("peak_source") or "").removesuffix(" peak")
            devices[of_attempt] = label if label in MAX_WATTS else None
    hours: dict[int, float] = {}
    for record in records:
        attempt: int = record["attempt"]
        time_s = record.get("step_time_s")
        if attempt not in ranks or attempt not in devices or not isinstance(time_s, int | float):
            return None, devices
        hours[attempt] = hours.get(attempt, 0.0) + time_s * ranks[attempt] / 3600
    return hours or None, devices


def _has_tokens(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step_tokens"), int) and isinstance(record.get("sequence_length"), int)


def _evaluation(trained: TrainedModel, run_dir: Path, facts: CardFacts) -> str:
    rows: list[tuple[str, str, str]] = []
    records, _ = _history(run_dir, trained.step)
    last: Mapping[str, Any] = {}
    for record in records:
        if any(key.startswith(HELDOUT_PREFIX) for key in record):
            last = record
    rows += [
        (
            f"held-out {markdown(key.removeprefix(HELDOUT_PREFIX))}",
            f"{value:,.5g}",
            f"measured in training, at step {last['step']:,}",
        )
        for key, value in last.items()
        if key.startswith(HELDOUT_PREFIX) and isinstance(value, int | float) and not key.endswith("time_s")
    ]
    if facts.loss is not None:
        corpus = code_span(facts.loss.root_sha256[:12])
        how = f"measured in fp32 on the first {facts.loss.tokens:,} tokens of the held-out corpus {corpus}"
        rows += [
            ("loss of the checkpoint", f"{facts.loss.checkpoint:.5f} nats per token", how),
            (f"loss of this export ({facts.form.name})", f"{facts.loss.exported:.5f} nats per token", how),
            (
                "what the form costs",
                f"{facts.loss.cost:+.5f} nats per token",
                "measured: the difference of the two",
            ),
        ]
    if not rows:
        return "There was no held-out text: nothing was measured."
    return markdown_table(_HEADERS, rows)


def _checks(facts: CardFacts) -> str:
    rows = [
        (
            "weights read back from the files",
            f"differ by at most {facts.weight_error:.2g} of their size",
            "measured: Frobenius norm, for each weight of the checkpoint",
        )
    ]
    parity = facts.parity
    if parity is None:
        why = "not measured: transformers reads this form into memory as a whole, and the model is large"
        return markdown_table(_HEADERS, [*rows, ("logits of transformers", "unknown", why)])
    rows += [
        (
            "logits of transformers",
            f"differ by at most {parity.max_difference:.2g} (allowed {parity.tolerance:.2g})",
            f"measured in fp32 on {parity.tokens:,} tokens, against this program with the weights of the files",
        ),
        (
            "most probable token is the same",
            f"{parity.argmax_agreement:.1%} of positions",
            "measured on the same tokens",
        ),
        (
            "tokens of a text",
            "the same",
            "measured: transformers with the exported tokenizer, on a text in several scripts",
        ),
    ]
    return markdown_table(_HEADERS, rows)
