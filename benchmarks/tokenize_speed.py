"""Compare tokenizing and writing shards with a plain loop: `python benchmarks/tokenize_speed.py FILE.jsonl...`

Both get the documents that data_tools.prepare has gathered from the files, and the same model. The plain loop reads
JSON lines, encodes each text separately, and writes all tokens to one file. Ours does what prepare does next, with one
worker and the chunk size of a large corpus: it writes documents with bos and eos, the place, source and id of each,
held-out text separately, and shards with indexes and hashes, synced to disk. They run in turns, --repeats times, on
each file alone and on all files.
"""

from __future__ import annotations

import argparse
import array
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_tools.building.encode import encode_parts
from data_tools.building.gather import Gathered, gather, part_path, read_part
from data_tools.building.pack import pack
from data_tools.building.vocabulary import train_tokenizer
from data_tools.config import PrepareConfig
from data_tools.reading.sources import find_files
from pretrain.corpus.tokenizer import SENTENCEPIECE_NAME, Tokenizer


class Text(NamedTuple):
    """The documents that both programs process."""

    config: PrepareConfig
    gathered: Gathered
    work: Path
    lines: Path
    """The same documents as JSON lines, for the plain loop."""


class Cost(NamedTuple):
    """The seconds that one run takes."""

    cpu_s: float
    wall_s: float


def gather_text(files: list[Path], work: Path) -> Text:
    """Read and clean the documents and drop duplicates. This is not part of the measurement."""
    work.mkdir()
    config = PrepareConfig(
        input=[str(file) for file in files], output=str(work), workers=1, chunk_tokens=1 << 18
    )
    gathered = gather(config, find_files(config), work)
    lines = work / "lines.jsonl"
    with lines.open("w", encoding="utf-8") as out:
        for number in range(len(gathered.parts)):
            part = read_part(part_path(work, number))
            for name, text in zip(part.ids, part.texts, strict=True):
                out.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    return Text(config, gathered, work, lines)


def plain(text: Text, model: Path) -> None:
    """The plain loop that our code is compared with."""
    processor = SentencePieceProcessor(model_file=str(model))
    tokens = array.array("H")
    with text.lines.open(encoding="utf-8") as lines:
        for line in lines:
            tokens.extend(processor.encode(json.loads(line)["text"]))
    with (text.work / "tokens.bin").open("wb") as out:
        tokens.tofile(out)


def ours(text: Text, model: Path) -> None:
    """The part of `data_tools.prepare` that follows gathering."""
    for old in text.work.glob("tokens-*.npz"):
        old.unlink()
    corpus = text.work / "corpus"
    rmtree(corpus, ignore_errors=True)
    corpus.mkdir()
    (corpus / SENTENCEPIECE_NAME).write_bytes(model.read_bytes())
    encode_parts(text.gathered, text.work, model, 1)
    pack(text.config, text.gathered, text.work, corpus, Tokenizer.trusted(corpus / SENTENCEPIECE_NAME))


def cost(work: Callable[[Text, Path], None], text: Text, model: Path) -> Cost:
    """The cost of one run, without its progress lines."""
    with redirect_stderr(StringIO()):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        work(text, model)
        return Cost(time.process_time() - cpu_s, time.perf_counter() - wall_s)


def spread(values: list[float]) -> str:
    """Values as their median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def measure(name: str, text: Text, model: Path, repeats: int) -> str:
    """Measure one text and return its row of the table."""
    theirs, mine = [], []
    for _ in range(repeats):
        theirs.append(cost(plain, text, model))
        mine.append(cost(ours, text, model))
    megabytes = text.gathered.funnel.kept_bytes / 1e6
    cells = [name, f"{megabytes:.1f}", f"{text.gathered.funnel.kept:,}"]
    cells += [spread([megabytes / run.cpu_s for run in runs]) for runs in (theirs, mine)]
    pairs = list(zip(theirs, mine, strict=True))
    cells.append(spread([a.cpu_s / b.cpu_s for a, b in pairs]))
    cells.append(spread([a.wall_s / b.wall_s for a, b in pairs]))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help='JSON lines with "text"')
    parser.add_argument(
        "--tokenizer", type=Path, help="a sentencepiece model (default: one that is trained on all files)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        everything = gather_text(args.files, Path(folder) / "all")
        model = args.tokenizer
        if model is None:
            model = Path(folder) / SENTENCEPIECE_NAME
            train_tokenizer(everything.config.tokenizer, everything.gathered, everything.work, model)
        texts = {"all": everything}
        if len(args.files) > 1:
            texts = {
                file.stem: gather_text([file], Path(folder) / str(n)) for n, file in enumerate(args.files)
            }
            texts["all"] = everything
        n_entries = SentencePieceProcessor(model_file=str(model)).get_piece_size()
        print(
            f"a vocabulary of {n_entries:,}, one worker, {args.repeats} repeats in turns; median (range); MB of text\n"
        )
        print("| text | MB | documents | plain loop, MB/s of CPU time | ours | ratio | ratio of wall time |")
        print("|---|---|---|---|---|---|---|")
        for name, text in texts.items():
            print(measure(name, text, model, args.repeats), flush=True)


if __name__ == "__main__":
    main()
