"""Measure the speed of reading: `python benchmarks/loader_speed.py DIR/manifest.json [--peers] [--repeats 3]`

Measures local random access to sequences of 2,048 tokens, whole batches, a seek to any of 10^9 samples, 1,000 ranks
over 100,000 shards, and the first batch at 0%, 50% and 99% of a run. With --peers, webdataset, litdata and
mosaicml-streaming read the same tokens where they are installed, in turn with ours. Rates are per second of CPU time
on one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.config import DataConfig, Packing
from pretrain.config.data_stages import DataStage
from pretrain.corpus.shards import Corpus
from pretrain.data.loader import TrainLoader
from pretrain.data.order import Order, SourceSize
from pretrain.data.sequences import SequenceReader

LENGTH = 2048
BATCH = 32
BATCHES = 200

Read = Callable[[int], int]
"""Reads batch number n and returns the number of its sequences."""


def rate(read: Read, batches: int = BATCHES) -> float:
    """Sequences per second of CPU time."""
    started, n = time.process_time(), 0
    for number in range(batches):
        n += read(number)
    return n / (time.process_time() - started)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):>12,.0f} ({min(values):,.0f} to {max(values):,.0f})"


# ---- ours ------------------------------------------------------------------------------------------------------------


def order_of(corpus: Corpus, lanes: int = 8) -> Order:
    size = SourceSize(corpus.n_chunks, corpus.chunk_tokens, corpus.last_chunk_tokens)
    stage = DataStage(weights=(1.0,), sequence_length=LENGTH, batch_sequences=BATCH)
    return Order([size], [stage], lanes=lanes, window_chunks=32, seed=0)


def random_access(corpus: Corpus) -> Read:
    """Read the tokens of random sequences from the whole corpus."""
    random = np.random.default_rng(0)
    per_chunk = corpus.chunk_tokens // LENGTH

    def read(_: int) -> int:
        chunks = random.integers(0, corpus.n_chunks - 1, 8 * BATCH)
        starts = random.integers(0, per_chunk, 8 * BATCH) * LENGTH
        rows = corpus.read_many(
            list(zip(chunks.tolist(), starts.tolist(), (starts + LENGTH).tolist(), strict=True))
        )
        return len(rows)

    return read


def whole_batches(corpus: Corpus, **options: object) -> Read:
    """Locate, read and label whole batches, which is all that a loader worker does."""
    order, reader = order_of(corpus), SequenceReader([corpus], DataConfig(**options))

    def read(number: int) -> int:
        samples = np.arange(number * BATCH, (number + 1) * BATCH)
        reader.read(order.locate(samples), samples, LENGTH)
        return BATCH

    return read


# ---- peers -----------------------------------------------------------------------------------------------------------


def webdataset_peer(corpus: Corpus, folder: Path) -> Read:
    """webdataset's own reader over our shards, in order, because it has no random access."""
    import webdataset

    shards = [str(corpus.manifest_path.parent / "shards" / s.name) for s in corpus.manifest.shards]
    dtype = np.dtype(corpus.manifest.dtype)

    def sequences() -> object:
        while True:
            for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
                tokens = np.frombuffer(sample["tok"], dtype)
                yield from tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)

    stream = sequences()

    def read(_: int) -> int:
        np.stack([next(stream) for _ in range(BATCH)])
        return BATCH

    return read


def _rows(corpus: Corpus, n: int) -> np.ndarray:
    per_chunk = corpus.chunk_tokens // LENGTH
    chunks = -(-n // per_chunk)
    rows = [corpus.read(chunk, 0, corpus.chunk_tokens).reshape(-1, LENGTH) for chunk in range(chunks)]
    return np.concatenate(rows)[:n]


def litdata_peer(corpus: Corpus, folder: Path) -> Read:
    """litdata's StreamingDataset with its TokensLoader: random items of a prepared folder."""
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    target = folder / "litdata"
    writer = BinaryWriter(str(target), chunk_bytes="64MB", item_loader=TokensLoader())
    import torch

    rows = _rows(corpus, 8192)
    for number, row in enumerate(rows):
        writer.add_item(number, torch.from_numpy(row.astype(np.int32)))
    writer.done()
    writer.merge()
    data = StreamingDataset(str(target), item_loader=TokensLoader(block_size=LENGTH), shuffle=False)
    random = np.random.default_rng(0)

    def read(_: int) -> int:
        np.stack([data[int(i)].numpy() for i in random.integers(0, len(data), BATCH)])
        return BATCH

    return read


def mosaicml_peer(corpus: Corpus, folder: Path) -> Read:
    """mosaicml-streaming: random items of MDS shards."""
    from streaming import MDSWriter, StreamingDataset

    target = str(folder / "mds")
    with MDSWriter(out=target, columns={"tokens": "ndarray:uint16"}, size_limit=1 << 26) as writer:
        for row in _rows(corpus, 8192):
            writer.write({"tokens": row.astype(np.uint16)})
    data = StreamingDataset(local=target, remote=None, shuffle=False, batch_size=BATCH)
    random = np.random.default_rng(0)

    def read(_: int) -> int:
        np.stack([data[int(i)]["tokens"] for i in random.integers(0, len(data), BATCH)])
        return BATCH

    return read


PEERS = {"webdataset": webdataset_peer, "litdata": litdata_peer, "streaming": mosaicml_peer}
PACKAGES = {"webdataset": "webdataset", "litdata": "litdata", "streaming": "mosaicml-streaming"}


# ---- seeks, scale, starts ----------------------------------------------------------------------------------------


def measure_seeks(repeats: int) -> None:
    """Measure a seek to one of 10^9 samples, in a corpus of 8 million chunks with 1,024 lanes."""
    size = SourceSize(8_000_000, 1 << 18, 1 << 18)
    stage = DataStage(weights=(1.0,), sequence_length=LENGTH, batch_sequences=1024)
    tracemalloc.start()
    order = Order([size], [stage], lanes=1024, window_chunks=32, seed=0)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    random = np.random.default_rng(1)
    times = []
    for _ in range(100 * repeats):
        sample = random.integers(0, 10**9, 1)
        started = time.perf_counter()
        order.locate(sample)
        times.append(1e3 * (time.perf_counter() - started))
    print(
        f"seek to one of 10^9 samples: {statistics.median(times):.2f} ms (95%: {np.percentile(times, 95):.2f}), "
        f"tables {memory / 1e6:.1f} MB"
    )


def _one_of_1000(manifest: Path) -> TrainLoader:
    return TrainLoader(
        DataConfig(manifest=str(manifest), sequence_length=LENGTH, loader_workers=0),
        0,
        global_batch_sequences=4000,
        micro_batch_sequences=4,
        rank=617,
        world_size=1000,
        total_steps=1_000_000,
        state=None,
    )


def measure_scale() -> None:
    """Measure the start time and memory of one of 1,000 ranks over 100,000 shards. No shard is read."""
    from pretrain.corpus.manifest import CorpusSource, Manifest, ShardInfo

    shards = [
        ShardInfo(
            name=f"shard-{n:05d}.tar",
            bytes=(1 << 30) - 1024,
            sha256=f"{n:064x}",
            index_sha256=f"{n:064x}",
            first_chunk=n * 2000,
            chunks=2000,
            documents=1000,
            tokens=2000 << 18,
        )
        for n in range(100_000)
    ]
    manifest = Manifest(
        tokenizer_sha256="0" * 64,
        vocab_size=50_000,
        bos_id=1,
        eos_id=2,
        dtype="uint16",
        chunk_tokens=1 << 18,
        n_chunks=200_000_000,
        n_tokens=200_000_000 << 18,
        n_documents=100_000_000,
        sources=[CorpusSource(name="web")],
        shards=shards,
    )
    manifest.root_sha256 = manifest.compute_root_sha256()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        path.write_text(manifest.to_json(), encoding="utf-8")
        n_bytes = path.stat().st_size
        del shards, manifest
        started = time.perf_counter()
        _one_of_1000(path)
        init_s = time.perf_counter() - started
        tracemalloc.start()
        loader = _one_of_1000(path)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        times = []
        for step in range(999_900, 1_000_000):
            started = time.perf_counter()
            loader.order.locate(loader._micro_batches_of(loader.plan[step])[0])
            times.append(1e3 * (time.perf_counter() - started))
    print(
        f"one of 1,000 ranks, 100,000 shards (a manifest of {n_bytes / 1e6:.0f} MB): start {init_s:.2f} s, "
        f"{held / 1e6:.0f} MB held, {peak / 1e6:.0f} MB at most; a step's samples located in "
        f"{statistics.median(times):.1f} ms"
    )


def measure_first_batch(manifest: str, repeats: int) -> None:
    """Measure a whole start: corpus, order, worker process, and first batch."""
    for share in (0.0, 0.5, 0.99):
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            loader = TrainLoader(
                DataConfig(manifest=manifest, sequence_length=LENGTH, loader_workers=1),
                0,
                global_batch_sequences=BATCH,
                micro_batch_sequences=4,
                rank=0,
                world_size=1,
                total_steps=1_000_000,
                state=None,
            )
            steps = loader.steps(max(1, int(share * 1_000_000)))
            next(steps)
            times.append(time.perf_counter() - started)
            steps.close()  # type: ignore[attr-defined]
        print(
            f"first batch at {share:.0%} of 10^6 steps, a worker process started: {statistics.median(times):.2f} s "
            f"({min(times):.2f} to {max(times):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifest", help="manifest.json of a local corpus with chunks of at least 2,048 tokens"
    )
    parser.add_argument(
        "--peers", action="store_true", help="also read with the other libraries that are installed"
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    corpus = Corpus(arguments.manifest)
    jobs = {
        "ours: random sequences, 256 per read": random_access(corpus),
        "ours: whole batches, documents masked": whole_batches(corpus),
        "ours: whole batches, not masked": whole_batches(corpus, document_masking=False),
        "ours: whole batches, best-fit packing": whole_batches(corpus, packing=Packing.best_fit),
    }
    folder = Path(tempfile.mkdtemp(prefix="loader-speed-"))
    try:
        for name, make in PEERS.items() if arguments.peers else ():
            try:
                job = make(corpus, folder)
            except ImportError as error:
                print(f"{PACKAGES[name]} is skipped: {error}")
            else:
                jobs[f"{PACKAGES[name]} {importlib.metadata.version(PACKAGES[name])}"] = job
        found: dict[str, list[float]] = {name: [] for name in jobs}
        for job in jobs.values():
            job(0)  # not timed: this opens files and checks the hashes of chunks
        for _ in range(arguments.repeats):
            for name, job in jobs.items():
                found[name].append(rate(job))
        print(f"\n{'sequences of 2,048 tokens per second and core':<48}{'median (range)':>24}")
        for name, values in found.items():
            print(f"{name:<48}{spread(values)}")
        print()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measure_seeks(arguments.repeats)
    measure_scale()
    measure_first_batch(arguments.manifest, arguments.repeats)


if __name__ == "__main__":
    main()
