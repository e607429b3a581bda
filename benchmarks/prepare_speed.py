"""Compare a whole preparation with a plain loop: `python benchmarks/prepare_speed.py MODEL FILE.jsonl...`

Both read the same JSON lines and encode with the same sentencepiece model. The plain loop parses each line, encodes a
thousand texts per call with bos and eos, and writes all tokens to one file. Ours is the command `data_tools.prepare`
with that model and one worker: it also cleans, drops duplicates, hashes, holds out, shuffles, writes shards with ids
and indexes, measures the tokenizer, and describes the corpus. They run in turns in this process, --repeats times, after
a run of each that is not measured. With --sentences=N, the files are first cut at the marks that end a Chinese
sentence, up to N different texts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from shutil import rmtree

import numpy as np
from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_tools.config import PrepareConfig, TokenizerConfig
from data_tools.prepare import prepare

_SENTENCE = re.compile(r"[^\u3002\uff01\uff1f\uff1b\n]+[\u3002\uff01\uff1f\uff1b]?")
_SHORTEST_CHARS = 10
_BATCH = 1000


def plain(file: Path, model: Path, output: Path) -> None:
    """The loop that our command is compared with."""
    processor = SentencePieceProcessor(model_file=str(model))

    def encoded(texts: list[str]) -> bytes:
        rows = processor.encode(texts, num_threads=1, add_bos=True, add_eos=True)
        return np.concatenate([np.array(row, np.uint16) for row in rows]).tobytes()

    with file.open(encoding="utf-8") as lines, output.open("wb") as out:
        texts = list[str]()
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == _BATCH:
                out.write(encoded(texts))
                texts.clear()
        if texts:
            out.write(encoded(texts))


def ours(file: Path, model: Path, output: Path) -> None:
    """The whole command."""
    rmtree(output, ignore_errors=True)
    config = PrepareConfig(
        input=[str(file)], output=str(output), workers=1, tokenizer=TokenizerConfig(path=str(model))
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        if code := prepare(config):
            raise SystemExit(code)


def cpu_s(work: Callable[[Path, Path, Path], None], file: Path, model: Path, output: Path) -> float:
    begin_s = time.process_time()
    work(file, model, output)
    return time.process_time() - begin_s


def sentences(files: list[Path], n: int, path: Path) -> Path:
    """Write up to `n` different sentences of the files."""
    seen = set[str]()
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            for line in file.open(encoding="utf-8"):
                for found in map(str.strip, _SENTENCE.findall(json.loads(line)["text"])):
                    if len(found) >= _SHORTEST_CHARS and found not in seen and len(seen) < n:
                        seen.add(found)
                        out.write(json.dumps({"id": len(seen), "text": found}, ensure_ascii=False) + "\n")
    return path


def spread(values: list[float]) -> str:
    """Values as their median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a sentencepiece model of at most 65,536 entries")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--sentences", type=int, help="cut the files into this number of sentences")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = args.files
        if args.sentences:
            files = [sentences(files, args.sentences, Path(folder) / "sentences.jsonl")]
        print("| text | MB | documents | plain loop, CPU seconds | ours | ours / plain loop |")
        print("|---|---|---|---|---|---|")
        for file in files:
            outputs = (Path(folder) / "tokens.bin", Path(folder) / "corpus")
            pairs = [
                [
                    cpu_s(work, file, args.model, output)
                    for work, output in zip((plain, ours), outputs, strict=True)
                ]
                for _ in range(args.repeats + 1)
            ][1:]
            n_documents = sum(1 for _ in file.open("rb"))
            cells = [file.stem, f"{file.stat().st_size / 1e6:.1f}", f"{n_documents:,}"]
            cells += [spread([one for one, _ in pairs]), spread([other for _, other in pairs])]
            print(f"| {' | '.join(cells)} | {spread([b / a for a, b in pairs])} |", flush=True)


if __name__ == "__main__":
    main()
