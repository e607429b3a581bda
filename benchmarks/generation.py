"""Measure how fast a run's model writes, beside transformers: `python benchmarks/generation.py RUN_DIR [--repeats N]`

Both write the same greedy text from the same prompts, ours from the checkpoint and theirs from its export, in turns in
one process with the same number of threads. The table has tokens per second: the median and range of N turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.harness.worker import device_name
from pretrain.convert.hugging_face import export
from pretrain.corpus.tokenizer import CHECK_TEXT
from pretrain.generation.sampling import Sampling
from pretrain.generation.writer import Writer
from pretrain.trained import load_trained

PROMPT_TOKENS = 32


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to write after each prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, fp32, tokens/s: median (range)"
    )
    print(f"{'prompts':>8}  {'pretrain':>24}  {'transformers':>24}  {'ratio':>6}")
    writers = make_writers(options.run_dir, options.tokens)
    for n_prompts in options.batches:
        rates: dict[str, list[float]] = {name: [] for name in writers}
        for turn in range(options.repeats + 1):
            for name, write in writers.items():
                start = time.perf_counter()
                n_tokens = write(n_prompts)
                if turn > 0:  # the first turn warms up
                    rates[name].append(n_tokens / (time.perf_counter() - start))
        medians = [statistics.median(found) for found in rates.values()]
        shown = [
            f"{median:,.0f} ({min(found):,.0f} to {max(found):,.0f})"
            for median, found in zip(medians, rates.values(), strict=True)
        ]
        print(f"{n_prompts:>8}  {shown[0]:>24}  {shown[1]:>24}  {medians[0] / medians[1]:>6.2f}")


def make_writers(run_dir: Path, n_tokens: int) -> dict[str, Callable[[int], int]]:
    """What writes `n_tokens` tokens after each of a number of prompts, and returns how many that were in all."""
    import transformers

    trained = load_trained(run_dir)
    prompt = [trained.tokenizer.bos_id, *trained.tokenizer.encode(CHECK_TEXT)][:PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        export(trained, Path(folder) / "model", dtype=torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
    model = trained.decoder(torch.device("cpu"), torch.float32)
    writer = Writer(model, trained.tokenizer, sampling=Sampling(temperature=0), max_new_tokens=n_tokens)
    endless = {"tokens": prompt, "max_new_tokens": n_tokens, "end_ids": ()}

    def ours(n_prompts: int) -> int:
        prompts = [replace(writer.after(""), **endless) for _ in range(n_prompts)]
        return sum(len(answer.tokens) for answer in writer.write(prompts))

    def hugging_face(n_prompts: int) -> int:
        found = theirs.generate(
            torch.tensor([prompt] * n_prompts),
            attention_mask=torch.ones(n_prompts, len(prompt), dtype=torch.int64),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
        )
        return int(found[:, len(prompt) :].numel())

    return {"pretrain": ours, "transformers": hugging_face}


if __name__ == "__main__":
    main()
