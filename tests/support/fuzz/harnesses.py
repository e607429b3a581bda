"""One harness for each parser of untrusted input: a function that takes any bytes, and valid examples.

A harness catches the errors that its parser is allowed to raise. Every other exception is a finding, and so are a
crash, too much memory and too much time. A harness may write files in the current folder. Packages are imported where
they are used, so that each process loads only those of its own harness.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import selectors
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, RunError

CANARY = "canary-3b1f"
os.environ["CANARY"] = CANARY  # a secret that no stored file may read


@dataclass(frozen=True)
class Harness:
    """A parser to fuzz: `one` passes it any bytes, and `seeds` returns valid examples."""

    one: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    is_json: bool = False
    """Whether inputs are also mutated as JSON, value by value."""
    words: tuple[bytes, ...] = ()
    """Words that are sometimes inserted into inputs."""


@contextmanager
def refusing() -> Iterator[None]:
    """Accept ConfigError and RunError, whose text must not reveal the secret."""
    try:
        yield
    except (ConfigError, RunError) as error:
        if CANARY in str(error):
            raise AssertionError(f"a secret was told: {error}") from error


def write(name: str, content: bytes) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def as_object(data: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        found = json.loads(data)
        return found if isinstance(found, dict) else None
    return None


# --- corpora ---


@cache
def corpus_files() -> dict[str, bytes]:
    """The files of a corpus of two chunks, by name."""
    from pretrain.corpus.writer import CorpusWriter

    with tempfile.TemporaryDirectory() as folder:
        ids = {"tokenizer_sha256": "0" * 64, "vocab_size": 512, "bos_id": 1, "eos_id": 2}
        writer = CorpusWriter(Path(folder), **ids, chunk_tokens=64, sources=["code"])
        for number in range(4):
            tokens = [1, *range(10, 30), 2]
            writer.add_document(tokens, source="code", document_id=f"d{number}", text_bytes=50)
        writer.finish()
        return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def tar_member(suffix: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(corpus_files()["shard-00000.tar"])) as shard:
        return shard.extractfile(next(m for m in shard if m.name.endswith(suffix))).read()


def manifest(data: bytes) -> None:
    from pretrain.corpus.manifest import load_manifest

    raw = as_object(data)
    if raw is not None:  # an attacker who writes a manifest can also write matching hashes
        content = {key: value for key, value in raw.items() if key != "root_sha256"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        raw["root_sha256"] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        data = json.dumps(raw).encode()
    with refusing():
        load_manifest(write("manifest.json", data)).to_json()


def documents(data: bytes) -> None:
    import numpy as np

    from pretrain.corpus.shards import parse_documents

    for masked in (False, True):
        with refusing():
            found = parse_documents(data, "x.doc", n_tokens=64, n_sources=1, masked=masked)
            borders = [*found.starts.tolist(), 64]
            assert borders[0] == 0 and (np.diff(borders) > 0).all(), "pieces that do not fill the chunk"
            assert (found.source >= 0).all() and (found.offsets >= 0).all() and (found.text_bytes >= 0).all()
            assert all(isinstance(name, str) for name in found.ids)
    with refusing():
        found = parse_documents(data, "x.doc", n_tokens=64, n_sources=1, masked=True, sequence_tokens=32)
        assert (found.starts < found.ends).all() and (found.ends[:-1] <= found.starts[1:]).all()
        assert (found.starts // 32 == (found.ends - 1) // 32).all() and set(found.starts // 32) == {0, 1}


def masked_documents() -> bytes:
    return json.dumps(
        json.loads(tar_member(".doc")) | {"targets": [3, 9, 20, 64], "target_bytes": [5, 0, 0]}
    ).encode()


def shard_index(data: bytes) -> None:
    from pretrain.corpus.manifest import Manifest, parse_index

    with refusing():
        parse_index(data, Manifest.from_json(corpus_files()["manifest.json"].decode()), 0, "x.idx")


def tar_header(data: bytes) -> None:
    from pretrain.corpus.manifest import header_problem

    header_problem(data[:512], "000000.tok", 128)


# --- checkpoints and run folders ---


@cache
def run_files() -> dict[str, bytes]:
    """The files of a run folder with one checkpoint, by path."""
    import torch

    from pretrain.checkpoint import tensors as checkpoint
    from pretrain.config import TrainConfig, load_config, to_dict
    from pretrain.config.data_stages import plan_stages
    from pretrain.data.state import OrderState
    from pretrain.distributed import Partition

    given = ["run_dir=r", "data.manifest=m", "total_steps=9", "schedule.warmup_steps=1", "model=tiny"]
    config = load_config(TrainConfig, given, "config")
    order = OrderState(
        manifest_sha=["0" * 64], seed=1, stages=plan_stages(config.data, 32), consumed_samples=32,
        lanes=config.data.lanes, chunk_tokens=[64], window_chunks=4, packing="concatenate",
    )  # fmt: skip
    state: dict[str, Any] = {
        "step": 1, "tokens_seen": 9, "samples_seen": 3, "sequence_length": 64, "optimizer_step": 1, "attempt": 1,
        "order": order.to_dict(), "loss_guard": {}, "tokenizer_sha256": "0" * 64, "run_id": "a", "wandb_run_id": "a",
        "world_size": 1, "zero_stage": 3, "precision": "fp32", "loss_scale": None, "versions": {"pretrain": "0"},
        "config": to_dict(config), "micro_batch_found": None, "tensors": {"a": [2, 3]},
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        partition = {"weight.a": Partition(torch.arange(6.0), 6)}
        checkpoint.save(Path(folder), 1, partition, state, checkpoint.ALONE)
        (Path(folder) / "config.json").write_text(json.dumps(to_dict(config)))
        found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    torch.distributed.destroy_process_group()
    return found


STEP = "checkpoints/step-00000001"


def run_file(end: str) -> bytes:
    return next(content for name, content in run_files().items() if name.endswith(end))


def write_run(end: str, data: bytes) -> Path:
    """Write the run with one of its files replaced. COMPLETE matches it, unless COMPLETE is the replaced file."""
    import xxhash

    files = {name: data if name.endswith(end) else content for name, content in run_files().items()}
    listing = json.loads(files[f"{STEP}/COMPLETE"]) if end != "COMPLETE" else None
    for name in listing["files"] if listing else ():
        content = files[f"{STEP}/{name}"]
        listing["files"][name] |= {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    if listing:
        files[f"{STEP}/COMPLETE"] = json.dumps(listing).encode()
    for name, content in files.items():
        write(f"run/{name}", content)
    return Path("run")


def state(data: bytes) -> None:
    from pretrain.data.history import ReadHistory

    with refusing():
        ReadHistory.of_run(write_run("state.json", data))


def complete(data: bytes) -> None:
    from pretrain.checkpoint.folder import newest_state

    with refusing():
        newest_state(write_run("COMPLETE", data))


def stored_config(data: bytes) -> None:
    """Read the configuration that a checkpoint or a run folder stores."""
    from pretrain.checkpoint.folder import root_of_run
    from pretrain.config import stored_config as read_config
    from pretrain.config import to_dict

    with refusing():
        root_of_run(write("stored/config.json", data).parent)
    if (found := as_object(data)) is not None:
        with refusing():
            assert CANARY not in str(to_dict(read_config(found, "x")))


def safetensors(data: bytes) -> None:
    from pretrain.checkpoint.tensors import load_weights

    with refusing():
        load_weights(write_run(".safetensors", data))


def safetensors_header(data: bytes) -> None:
    safetensors(len(data).to_bytes(8, "little") + data + bytes(24))


def journal(data: bytes) -> None:
    """Read the files that a run appends to, each with the same lines."""
    from pretrain.reliability.journal import read_ledger, read_metrics

    for name in ("events.jsonl", "metrics.jsonl", "ledger/rank-00000.jsonl"):
        write(f"journal/{name}", data)
    for history in (read_metrics, read_ledger):
        with refusing():
            history(Path("journal"))


JOURNAL = b"""{"event": "started", "attempt": 1, "step": 0}
{"kind": "step", "event": "checkpoint", "step": 1, "attempt": 1, "loss": 2.5, "samples": [0, 1], "tokens_xxh3": "00"}
{"event": "resumed", "attempt": 2, "step": 1, "kind": "evaluation", "heldout/loss": "NaN"}
{"kind": "step", "event": "rollback", "step": 2, "attempt": 2, "loss": null, "samples": [], "tokens_xxh3": "00"}
"""


# --- evaluation ---


def task(data: bytes) -> None:
    """Read a task file in both forms, the items of a task, and a file of results."""
    from data_tools.text import clean
    from pretrain.evaluate.results import read_results
    from pretrain.evaluate.tasks.questions import questions_of
    from pretrain.evaluate.tasks.task import load_task

    for name, content in (("task/x.yaml", data), ("task/x.json", data), ("task/own.yaml", OWN_TASK)):
        path = write(name, content)
        write("task/items.jsonl", data if content is OWN_TASK else ITEMS)
        with refusing():
            questions_of(load_task(path), clean, 10)
    with refusing():
        read_results(write("task/results.json", data))


OWN_TASK = (
    b"""{kind: multiple_choice, data: items.jsonl, prompt: '{q}', examples: items.jsonl, n_examples: 1}"""
)
ITEMS = b'{"id": 1, "q": "a", "choices": ["b", "c"], "answer": 1, "references": ["d"], "label": "x"}\n' * 2
TASKS = [
    b"""kind: classification
data: items.jsonl
prompt: "{q} {{}}"
labels: {x: one, y: two}
where: {id: [1, 2]}
examples_where: {id: 1}
""",
    b'{"kind": "generation", "data": ["items.jsonl"], "prompt": "{q}", "metrics": ["bleu"], "stop": ["\\n"]}',
    ITEMS,
    b"""{"format": 1, "task": "a", "kind": "text", "task_sha256": "", "run_dir": "r", "step": 1, "tokens_seen": 2,
"precision": "fp32", "n_examples": 0, "chat": false, "main": "loss", "truncated": 0, "empty": 0, "unscored": [],
"scores": {"loss": {"value": 1.5, "standard_error": null, "higher_is_better": false}}, "items": [{"id": "1",
"hash": "h", "scores": {"loss": 1.5}, "statistics": {"loss": [3.0, 2.0]}}]}""",
]


# --- texts ---


def read(data: bytes, name: str, kind: str, encoding: str = "utf-8") -> None:
    from data_tools.reading.units import ReadConfig, Unit, read_unit

    write(name, data)
    unit = Unit(path=name, name=name, source="s", kind=kind)
    # 66 bytes of bz2 can hold a million blank lines, and reading them takes seconds. What one input unpacks to is
    # bounded here, so that the limit on time finds slow parsers and not large inputs. test_bombs.py is about those.
    config = ReadConfig(encoding=encoding, max_unpacked_bytes=1 << 17)
    for record in read_unit(unit, config, lambda _: None):
        for text in (record.id, record.text, record.source, record.url or "", record.license or ""):
            text.encode()


def json_lines() -> bytes:
    lines = [{"text": "a b", "id": 1}, {"text": "\u4e2d", "url": "http://a/", "license": None, "source": "s"}]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def json_of_any_form() -> list[bytes]:
    values = [json.loads(line) for line in json_lines().splitlines()]
    one = json.dumps(values[1], indent=1)
    return [json_lines(), json.dumps(values).encode(), json.dumps(values, indent=1).encode(), one.encode()]


CSV = b'id,text\r\n1,"a ""b"",\n c"\r\n2,d\n'


def zst() -> bytes:
    import zstandard

    return zstandard.compress(json_lines())


def dialogues(data: bytes) -> None:
    from data_tools.reading import dialogue

    if (record := as_object(data)) is not None:
        with suppress(dialogue.DialogueError):
            found = dialogue.parse(record)
            assert dialogue.load(dialogue.dump(found)) == found
            dialogue.has_turn_of(found.messages, ["assistant"])
            dialogue.plain(found.messages)


DIALOGUES = [
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    b'{"prompt": "a", "response": "b"}',
    b'{"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["x", "y"]]}',
    b'{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "completion": "b"}',
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{\\"name\\": \\"f\\", '
    b'\\"arguments\\": {}}"}, {"from": "observation", "value": ""}], "tools": "[{}]"}',
    b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "function": {"name": "f", '
    b'"arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "x"}], "tools": [{"a": 1}]}',
]


def chat_template(data: bytes) -> None:
    from pretrain.corpus.chat_template import DialogueError, Renderer

    renderer = Renderer(data.decode(errors="replace"), {"bos_token": "<s>", "eos_token": "</s>"})
    with refusing(), suppress(DialogueError):
        text, spans = renderer.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        assert CANARY not in text
        assert all(0 <= start < stop <= len(text) for start, stop in spans)
    renderer.close()


@cache
def chat_templates() -> list[bytes]:
    from support.chat_templates import GENERATION, LLAMA_2, QWEN

    return [template.encode() for template in (GENERATION, LLAMA_2, QWEN)]


def table() -> Any:
    import pyarrow

    return pyarrow.table({"x": [{"y": 1}, None], "text": ["a b", "c"], "id": ["1", "2"]})


def parquet() -> list[bytes]:
    from pyarrow import parquet

    made = []
    for settings in ({}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"}):
        parquet.write_table(table(), file := io.BytesIO(), **settings)
        made.append(file.getvalue())
    return made


def arrow() -> bytes:
    import pyarrow

    with pyarrow.ipc.new_stream(file := io.BytesIO(), table().schema) as writer:
        writer.write_table(table())
    return file.getvalue()


def tar_of_text() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, content in (
            ("a/0.txt", b"a b"),
            ("a/0.json", b'{"id": 1}'),
            (f"{'b' * 120}/1.json", b'{"text": "c"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


PAGE = b"""<html><head><meta charset="utf-8"><title>T</title></head><body><nav><a href="/">Home</a></nav>
<article><h1>A title</h1><p>A first paragraph that has some words in it, and more words.</p><table><tr><td>x</td></tr>
</table><ul><li>one</li></ul><pre>code</pre><p>A second one, with <b>bold</b> words.</p></article></body></html>"""


def html(data: bytes) -> None:
    from data_tools.reading.web.pages import main_text

    main_text(data, "text/html").encode("utf-8", "surrogatepass")


def warc() -> list[bytes]:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    made = []
    for packed in (False, True):
        writer = WARCWriter(file := io.BytesIO(), gzip=packed)
        for number in range(2):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            url, body = f"http://a/{number}", io.BytesIO(PAGE)
            writer.write_record(
                writer.create_warc_record(url, "response", payload=body, http_headers=headers)
            )
        made.append(file.getvalue())
    return made


# --- tokenizers ---


def tokenizer(data: bytes) -> None:
    from pretrain.corpus.tokenizer import Tokenizer
    from pretrain.corpus.tokenizer_trial import use

    try:  # a tokenizer that fails in its trial process is not opened
        use(data)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        return
    with refusing():
        found = Tokenizer.from_content(data, Path("tokenizer.model"))
        ids = found.encode("A text, \u4e2d\u6587 \u2581 <s> 12\n\n  and more.")
        found.decode([*ids, *range(min(found.vocab_size, 64))])
        found.piece(0)


@cache
def models() -> list[bytes]:
    from sentencepiece import SentencePieceTrainer

    sentences = ["a few words of text to learn from", "and some more words", "12 34"] * 20
    rule = write(
        "rule.tsv", b"41\t61\nC4\t41 308\nAC00\t1100 1161\n"
    )  # the default rules would make the file large
    made = []
    for kind in ("bpe", "unigram"):
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=(file := io.BytesIO()), vocab_size=300, model_type=kind,
            byte_fallback=True, hard_vocab_limit=False, normalization_rule_tsv=str(rule), minloglevel=2,
        )  # fmt: skip
        made.append(file.getvalue())
    return made


@cache
def tokenizer_jsons() -> list[bytes]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from pretrain.corpus.tokenizer import frame

    kinds = [
        (models.BPE(byte_fallback=False), trainers.BpeTrainer),
        (models.Unigram(), partial(trainers.UnigramTrainer, unk_token="[UNK]")),
        (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),  # type: ignore[arg-type]
    ]
    made = []
    for model, trainer in kinds:
        found = Tokenizer(model)
        found.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "\u2581")])
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        special = ["[UNK]", "<s>", "</s>"]
        found.train_from_iterator(
            ["a few words of text"] * 9, trainer(vocab_size=60, special_tokens=special, show_progress=False)
        )
        content = json.loads(found.to_str())
        content["post_processor"] = frame(("<s>", 1), ("</s>", 2))
        made.append(json.dumps(content).encode())
    return made


# --- peers and command lines ---


def hub(data: bytes) -> None:
    """Let a peer that may know the password talk to the hub of three ranks."""
    from pretrain.reliability.hub import Hub

    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as peer,
        selectors.DefaultSelector() as selector,
    ):
        listener.bind(f"\0fuzz-{os.getpid()}")
        listener.listen()
        found = Hub(listener, "password", 3, selector)
        peer.setblocking(False)
        peer.connect(listener.getsockname())
        found.accept()
        (line,) = (key.data for key in selector.get_map().values() if key.data)
        for block in (data[: len(data) // 2], data[len(data) // 2 :]):
            with suppress(BlockingIOError):
                peer.send(block)
            messages = found.read(line) if line.open else []
            assert all(isinstance(message, dict) for message in messages) and not (
                messages and line.rank is None
            )
            assert set(found.lines) <= {1, 2}
        found.tend()
        found.drop(line)


def overrides(data: bytes) -> None:
    """Parse the arguments of a command line, one per line."""
    from pretrain.config import TrainConfig, load_config, to_dict

    arguments = data.decode("utf-8", "surrogateescape").split("\n")
    with refusing():
        to_dict(load_config(TrainConfig, arguments, "config"))


ARGUMENTS = "run_dir=r\ndata.manifest=m\nschedule.warmup_steps=1\ntotal_steps=9\n"
OVERRIDES = [
    "model=tiny", "model=no", "model.n_layers=1e9", "+model.x=1", "~model", "~optim.lr", "model@x=tiny", "model=[]",
    "hydra.run.dir=x", "hydra.searchpath=[file://x]", "hydra/launcher=basic", "+hydra.job.env_set={A: b}", "seed=null",
    "run_dir=${oc.env:CANARY}", "run_dir=${oc.env:NO_SUCH}", "seed=${oc.decode:'1'}", "seed=${seed}", "run_dir=${run_",
    "seed=1,2", "seed=range(1,3)", "data.sources=[{name: a, weight: .inf}]", "run_dir='a\\'b'", "+a@b:c=d", "=", "x",
    "data={manifest: m}", "_target_=os.system", "+model._target_=os.system", "experiment=../x", "run_dir=\0",
]  # fmt: skip

# --- earlier curations ---


@cache
def earlier_curation() -> tuple[Any, dict[str, bytes]]:
    """How two curations compare documents, and the files of the earlier one, by path."""
    from data_tools.curation.collection import PartFacts, index_of
    from data_tools.curation.dedup import DedupConfig, load_array, rows_path

    dedup = DedupConfig(bands=2, band_hashes=3, url=True, max_documents_per_domain=1)
    with tempfile.TemporaryDirectory() as folder:
        signatures, lines = sign_documents(dedup, "earlier")
        signatures.write(Path(folder), 0)
        rows = load_array(rows_path(Path(folder), 0)).tobytes()
    part = PartFacts(name="part-00000.jsonl", bytes=len(lines), documents=3)
    index = index_of(dedup, [part], "0" * 64, "pretrain 0")
    return dedup, {
        "signatures/index.json": json.dumps(index).encode(),
        "signatures/part-00000.rows": rows,
        "documents/part-00000.jsonl": lines,
    }


def sign_documents(dedup: Any, last_word: str) -> tuple[Any, bytes]:
    """Signatures of three documents, and their lines. With another last word, the first is a near duplicate."""
    from data_tools.curation.dedup import Signatures
    from data_tools.curation.phases import to_line
    from data_tools.record import Record

    signatures, lines = Signatures(dedup), b""
    words = " ".join(f"word{number}" for number in range(60))
    for number, text in enumerate((f"{words} {last_word}", "words that both have", "")):
        url = f"http://a{number}.com/x" if number else None
        record = Record(id=str(number), text=text, source="s", url=url)
        signatures.add(record, len(lines))
        lines += to_line(record)
    return signatures, lines


def add_to_earlier(files: dict[str, bytes]) -> None:
    """Compare the documents of a curation with those of an earlier one, whose files others made."""
    from data_tools.curation.collection import Collection, earlier_parts
    from data_tools.curation.compare import compare_task, decide, settle
    from data_tools.curation.dedup import write_tables
    from data_tools.curation.executors import TaskProgress
    from data_tools.curation.phases import Layout

    for name, content in files.items():
        write(f"earlier/{name}", content)
    dedup, layout = replace(earlier_curation()[0], against=["earlier"]), Layout(Path("work"))
    with refusing():
        parts = earlier_parts(dedup, Path("output"))
        collection = Collection(dedup, layout.work, 1, parts)
        if not layout.kept(0).exists():
            signatures, lines = sign_documents(dedup, "later")
            signatures.write(layout.work, 0)
            write(str(layout.kept(0)), lines)
        for rank, part in enumerate(parts, 1):
            write_tables(layout.work, rank, part.rows(dedup), dedup)
        settle(collection, layout)
        task, _ = compare_task(collection, layout)
        for job in range(len(task.jobs)):
            task.run(job, TaskProgress(Path("progress")))
        decide(task)


def signatures(data: bytes) -> None:
    """Compare with an earlier curation of which others made a file: the index, the documents or the rows.

    The index matches the documents and the rows, as that of an attacker would.
    """
    from data_tools.curation.dedup import row_type

    dedup, files = earlier_curation()
    index = json.loads(files["signatures/index.json"])
    if data.startswith(b'{"format"'):
        add_to_earlier(files | {"signatures/index.json": data})
        return
    if data.startswith(b"{"):
        index["parts"][0]["bytes"] = len(data)
        changed = {"documents/part-00000.jsonl": data}
    else:
        n_rows = len(data) // row_type(dedup).itemsize
        index["parts"][0]["documents"] = n_rows
        changed = {"signatures/part-00000.rows": data[: n_rows * row_type(dedup).itemsize]}
    add_to_earlier(files | changed | {"signatures/index.json": json.dumps(index).encode()})


# --- checkpoints of other programs ---


@cache
def foreign_files() -> dict[str, bytes]:
    """One tiny model as other programs save it, by the path of its file, and the pickles in these files."""
    import torch
    import torch.distributed.checkpoint as dcp

    from pretrain.config import ModelConfig
    from support.foreign import write_hf_bin, write_megatron

    model = ModelConfig(n_layers=1, d_model=4, n_heads=2, d_ff=4, vocab_size=8)
    blocks = {
        "self_attn.q_proj": (4, 4), "self_attn.k_proj": (4, 4), "self_attn.v_proj": (4, 4), "self_attn.o_proj": (4, 4),
        "mlp.gate_proj": (4, 4), "mlp.up_proj": (4, 4), "mlp.down_proj": (4, 4), "input_layernorm": (4,),
        "post_attention_layernorm": (4,),
    }  # fmt: skip
    weights = {f"model.layers.0.{name}.weight": torch.ones(shape) for name, shape in blocks.items()}
    weights |= {name: torch.ones(8, 4) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    weights["model.norm.weight"] = torch.ones(4)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_hf_bin(root, weights)
        write_megatron(root, weights, model, ranks=1)
        dcp.save(
            {"model": {"model.embed_tokens.weight": torch.ones(8, 4)}},
            checkpoint_id=root / "dcp",
            no_dist=True,
        )
        found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    for name in [name for name in found if name.endswith((".bin", ".pt"))]:
        with zipfile.ZipFile(io.BytesIO(found[name])) as archive:
            (inner,) = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
            found[f"{name}/data.pkl"] = archive.read(inner)
    return found


def read_foreign(folder: Path) -> None:
    """What the reading process does with a folder, up to the bytes of the tensors."""
    from pretrain.config import ModelConfig
    from pretrain.convert.foreign.layouts import find
    from pretrain.convert.foreign.naming import renamed, settings_of, vocabulary
    from pretrain.convert.foreign.pickled import PickledError

    with refusing(), suppress(PickledError):
        found = find(folder)
        settings, _ = settings_of(found)
        vocabulary(found)
        stated = {"n_layers": 1, "d_model": 4, "n_heads": 2, "d_ff": 4, "vocab_size": 8}
        for weight in renamed(found, ModelConfig(**(settings | stated))).values():
            assert weight.whole().shape == weight.shape


def foreign(data: bytes) -> None:
    """An archive of torch.save; or a pickle, as the index of torch.distributed.checkpoint and in archives of others."""
    if data.startswith(b"PK"):
        read_foreign(write("bin/pytorch_model.bin", data).parent)
        return
    files = foreign_files()
    for name, content in files.items():
        if name.startswith("dcp/__"):
            write(name, content)
    read_foreign(write("dcp/.metadata", data).parent)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(files["pytorch_model.bin"])) as archive,
        zipfile.ZipFile(packed, "w") as changed,
    ):
        for entry in archive.namelist():
            changed.writestr(entry, data if entry.endswith("data.pkl") else archive.read(entry))
    for folder, path in (
        ("megatron", "mp_rank_00/model_optim_rng.pt"),
        ("deepspeed", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("universal", "zero/model.norm.weight/fp32.pt"),
        ("litgpt", "lit_model.pth"),
    ):
        write(f"{folder}/{path}", packed.getvalue())
        write("deepspeed/mp_rank_00_model_states.pt", packed.getvalue())
        read_foreign(Path(folder))


PICKLE_WORDS = (
    b"cos\nsystem\n",
    b"R.",
    b"\x85R",
    b"\x81}b",
    b"K\xff",
    b"\x8a\x09" + b"\xff" * 9,
    b"(lp0\n",
    b"h\x00",
)

HARNESSES = {
    "manifest": Harness(manifest, lambda: [corpus_files()["manifest.json"]], is_json=True),
    "documents": Harness(documents, lambda: [tar_member(".doc"), masked_documents()], is_json=True),
    "shard_index": Harness(shard_index, lambda: [corpus_files()["shard-00000.idx"]]),
    "tar_header": Harness(tar_header, lambda: [corpus_files()["shard-00000.tar"][:512]]),
    "state": Harness(state, lambda: [run_file("state.json")], is_json=True),
    "complete": Harness(complete, lambda: [run_file("COMPLETE")], is_json=True),
    "stored_config": Harness(stored_config, lambda: [run_file("config.json")], is_json=True),
    "safetensors": Harness(safetensors, lambda: [run_file(".safetensors")]),
    "safetensors_header": Harness(
        safetensors_header,
        lambda: [b'{"weight.a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}', run_file(".safetensors")[8:-24]],
        is_json=True,
    ),
    "journal": Harness(journal, lambda: [JOURNAL], is_json=True),
    "task": Harness(task, lambda: TASKS, is_json=True, words=(b"{a}", b"&a [*a]", b"!!python/name:os.system")),
    "dialogues": Harness(dialogues, lambda: DIALOGUES, is_json=True),
    "chat_template": Harness(
        chat_template,
        chat_templates,
        words=(b"{% for a in range(99999) %}", b".__class__", b"|attr(", b"{{ 9 ** 9 ** 9 }}"),
    ),
    "jsonl": Harness(lambda data: read(data, "x.jsonl", "jsonl"), lambda: [json_lines()], is_json=True),
    "gzip": Harness(lambda data: read(data, "x.jsonl.gz", "jsonl"), lambda: [gzip.compress(json_lines())]),
    "json": Harness(lambda data: read(data, "x.json", "json"), json_of_any_form, is_json=True),
    "csv": Harness(lambda data: read(data, "x.csv", "csv"), lambda: [CSV, CSV.replace(b",", b"\t")]),
    "xz": Harness(lambda data: read(data, "x.json.xz", "json"), lambda: [lzma.compress(json_lines())]),
    "bz2": Harness(lambda data: read(data, "x.csv.bz2", "csv"), lambda: [bz2.compress(CSV)]),
    "gb18030": Harness(
        lambda data: read(data, "x.json", "json", "gb18030"),
        lambda: [json.dumps([{"text": "图书馆 é"}], ensure_ascii=False).encode("gb18030"), *json_of_any_form()],
    ),
    "utf_16": Harness(
        lambda data: read(data, "x.jsonl", "jsonl", "utf-16"),
        lambda: [json_lines().decode().encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-32")],
    ),
    "zst": Harness(lambda data: read(data, "x.jsonl.zst", "jsonl"), lambda: [zst()]),
    "parquet": Harness(lambda data: read(data, "x.parquet", "parquet"), parquet),
    "arrow": Harness(lambda data: read(data, "x.arrow", "arrow"), lambda: [arrow()]),
    "warc": Harness(lambda data: read(data, "x.warc", "warc"), warc, words=(b"Content-Length: ", b"\r\n\r\n")),
    "tar": Harness(lambda data: read(data, "x.tar", "tar"), lambda: [tar_of_text()]),
    "html": Harness(html, lambda: [PAGE], words=(b"<div>" * 99, b"<a b=", b"<!--", b"charset=utf-7", b"&#x110000;")),
    "sentencepiece": Harness(tokenizer, models),
    "tokenizer_json": Harness(tokenizer, tokenizer_jsons, is_json=True),
    "hub": Harness(
        hub,
        lambda: [
            b'{"token": "password", "rank": 1, "host": "a"}\n{"rank": 1, "step": 3, "phase": "x"}\n',
            b'{"token": "another", "rank": 2, "host": "a"}\n{"alive": true}\n',
        ],
        is_json=True,
    ),
    "signatures": Harness(signatures, lambda: list(earlier_curation()[1].values()), is_json=True),
    "foreign": Harness(
        foreign,
        lambda: [c for n, c in foreign_files().items() if n.endswith(("model.bin", "data.pkl", ".metadata"))],
        words=PICKLE_WORDS,
    ),
    "overrides": Harness(
        overrides,
        lambda: [(ARGUMENTS + override).encode("utf-8", "surrogateescape") for override in OVERRIDES],
        words=tuple(override.encode() for override in OVERRIDES),
    ),
}  # fmt: skip
