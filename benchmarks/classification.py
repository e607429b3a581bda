"""What a small fine-tuned classifier is worth: python benchmarks/classification.py TEXTS.jsonl --work DIR [--lora]

TEXTS holds records of `text`, `label` and `split` (train or test). A tiny language model is trained on the training
texts without their labels, then fine-tuned to classify them, and with --lora by adapters too. The test texts give its
scores beside those of the most frequent class and of logistic regression on TF-IDF (scikit-learn). Everything runs on
the CPU, through the commands that a user has; the CPU seconds of each model are those of its training.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from pretrain.evaluate.classifier_scores import classifier_scores

LENGTH = 64
MODEL = [
    *("model.n_layers=3", "model.d_model=128", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=344"),
    *("model.tie_embeddings=true", f"data.sequence_length={LENGTH}", "global_batch_sequences=32"),
    *("micro_batch_sequences=32", "data.window_chunks=8", "logging.wandb=disabled", "watchdog.step_s=600"),
]
Text = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, metavar="TEXTS.jsonl")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="an empty folder for the runs"
    )
    parser.add_argument(
        "--train", type=int, default=8000, metavar="N", help="training texts, drawn at random"
    )
    parser.add_argument("--test", type=int, default=2000, metavar="N", help="test texts, drawn at random")
    parser.add_argument("--pretrain-tokens", type=int, default=400_000, metavar="N")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="of fine-tuning")
    parser.add_argument("--lora", action="store_true", help="fine-tune adapters too")
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    train, test = chosen(given.texts, "train", given.train), chosen(given.texts, "test", given.test)
    rows = {"most frequent class": majority(train, test), "TF-IDF, logistic regression": tf_idf(train, test)}
    rows |= fine_tuned(given, train, test)
    print(f"{given.texts.stem}: {len(train):,} training and {len(test):,} test texts")
    for name, (scores, cpu_s) in rows.items():
        figures = "  ".join(f"{key} {scores[key]:.3f}" for key in ("accuracy", "macro_f1", "ece", "brier"))
        print(f"{name:32} {figures}  {cpu_s:.0f} CPU s")


def chosen(path: Path, split: str, count: int) -> list[Text]:
    """Texts of a split, each once, drawn at random but the same at each call."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = list({r["text"]: r for r in records if r["split"] == split and len(r["text"]) >= 8}.values())
    return random.Random(0).sample(found, min(count, len(found)))


def majority(train: list[Text], test: list[Text]) -> tuple[dict[str, Any], float]:
    """The scores of the training texts' share of each class as probabilities."""
    counts = Counter(record["label"] for record in train)
    classes = sorted(counts)
    shares = np.array([counts[label] / len(train) for label in classes])
    labels = np.array([classes.index(record["label"]) for record in test])
    return classifier_scores(labels, np.tile(shares, (len(test), 1)), classes), 0.0


def tf_idf(train: list[Text], test: list[Text]) -> tuple[dict[str, Any], float]:
    """Words and pairs of them or, for Chinese, one to three characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    started = time.process_time()
    is_chinese = train[0].get("lang") == "zh"
    options: dict[str, Any] = (
        {"analyzer": "char", "ngram_range": (1, 3)} if is_chinese else {"ngram_range": (1, 2)}
    )
    features = TfidfVectorizer(min_df=2, sublinear_tf=True, **options)
    known = features.fit_transform([record["text"] for record in train])
    model = LogisticRegression(C=4, max_iter=1000).fit(known, [record["label"] for record in train])
    probabilities = model.predict_proba(features.transform([record["text"] for record in test]))
    classes = list(model.classes_)
    labels = np.array([classes.index(record["label"]) for record in test])
    return classifier_scores(labels, probabilities, classes), time.process_time() - started


def fine_tuned(given: argparse.Namespace, train: list[Text], test: list[Text]) -> dict[str, Any]:
    """The scores of each way to fine-tune, with the CPU seconds of its training."""
    work = given.work
    for name, texts in (("train", train), ("test", test)):
        lines = (json.dumps(record, ensure_ascii=False) for record in texts)
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = f"input=[{work / 'train.jsonl'}]"
    run("-m", "data_tools.prepare", texts, f"output={work / 'text'}", "tokenizer.vocab_size=4096")
    tokenizer = f"tokenizer.path={work / 'text' / 'tokenizer.model'}"
    options = ["format=labeled", f"labels.max_tokens={LENGTH}", "heldout_frac=0.05", tokenizer]
    run("-m", "data_tools.prepare", texts, f"output={work / 'labeled'}", *options)
    base_s = learn(work / "base", work / "text", f"total_tokens={given.pretrain_tokens}", "optim.lr=3e-3")
    rows: dict[str, Any] = {}
    ways = {"fine-tuned": ["optim.lr=1e-3"], "LoRA": ["optim.lr=5e-3", "lora.r=8"]}
    for name, more in ways.items():
        if name == "LoRA" and not given.lora:
            continue
        more = ["objective=classify", f"init_from={work / 'base'}", f"total_epochs={given.epochs}", *more]
        tuned_s = learn(work / name, work / "labeled", *more)
        rows[name] = (evaluated(work / name, work / "test.jsonl"), base_s + tuned_s)
    return rows


def learn(run_dir: Path, corpus: Path, *more: str) -> float:
    """Train, and return the CPU seconds that it took."""
    manifests = [
        f"data.manifest={corpus / 'manifest.json'}",
        f"evaluation.manifest={corpus}/heldout/manifest.json",
    ]
    return run("launch/train.py", f"run_dir={run_dir}", *manifests, *MODEL, "schedule.warmup_frac=0.1", *more)


def evaluated(run_dir: Path, texts: Path) -> dict[str, Any]:
    command = [
        "launch/eval.py",
        f"run_dir={run_dir}",
        f"input=[{texts}]",
        "micro_batch_sequences=64",
        "json=true",
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    scores: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return scores


def run(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
