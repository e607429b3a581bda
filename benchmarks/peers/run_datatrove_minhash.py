"""datatrove's MinHash deduplication with default settings: `python run_datatrove_minhash.py FOLDER`

Reads FOLDER/in/*.jsonl and writes FOLDER/kept.jsonl. Runs in an environment of its own, with xxhash below 4.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main() -> None:
    """Run its four steps, as its example does."""
    folder = Path(sys.argv[1])
    signatures, buckets, removed = (str(folder / name) for name in ("signatures", "buckets", "removed"))
    read = JsonlReader(str(folder / "in"))
    write = JsonlWriter(str(folder), output_filename="kept.jsonl", compression=None)
    pipelines = [
        ([read, MinhashDedupSignature(signatures)], 1),
        ([MinhashDedupBuckets(signatures, buckets)], 14),
        ([MinhashDedupCluster(buckets, removed)], 1),
        ([read, MinhashDedupFilter(removed), write], 1),
    ]
    for number, (steps, tasks) in enumerate(pipelines):
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(folder / f"logs-{number}")).run()


if __name__ == "__main__":
    main()
