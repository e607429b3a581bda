"""Train the model that tells code from prose, `data_tools/stages/code_model.tsv`.

    python benchmarks/train_code_model.py --programs programs.jsonl --prose prose.jsonl [--test test.jsonl]

Each file has a record per line, with `text` and `kind` (the language, or the origin); those of --test also have
`label` (1 is code). Kinds count equally, however many texts they have: each text has the weight
1 / sqrt(texts of its kind).

The shipped model was trained on 3,046 programs (the example files of the Pygments 2.18 source package; of GitHub
Linguist's samples those of half of the languages; files of Debian 12 packages in 25 formats, Go, three.js, Django and
SymPy; functions of half of the modules of Python's standard library) and on 11,120 texts of prose (news,
encyclopedias, fiction, verse, laws, reviews, mail, dialogues, dictionaries in four languages; manuals, man pages,
changelogs, license texts and docstrings). Of the sources that `benchmarks/curation/language.py` measures, its samples
were left out, except for the documentation of Perl and Git, of which there is little. Each is read
whole and as a few of its lines. Copies are added in which the comments are Chinese, the prose is Cyrillic, or the
prose has remains of HTML.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_tools.stages import code_text
from data_tools.stages.code_text import WEIGHT_SCALE, grams

FEATURES = 3000
_CANDIDATES, _FEWEST_TEXTS = 12_000, 8
_PENALTY = 1e-4
_PROSE_WEIGHT = 1.3
_CAUTION = 0.4
"""Subtracted from the bias: with it, prose of 17 languages on programming is taken for code less often than before."""
_COMMENT = re.compile(r'"""(?:.|\n)*?"""|/\*(?:.|\n)*?\*/|(?:#|//|--|;;) [^\n]*')
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,})*")
_CYRILLIC = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "абцдефгхийклмнопярстувжышзАБЦДЕФГХИЙКЛМНОПЯРСТУВЖЫШЗ",
)
_HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子"


def chinese_comments(text: str, rng: random.Random) -> str:
    def words(run: re.Match[str]) -> str:
        return "".join(rng.choices(_HAN, k=max(2, len(run[0]) // 3)))

    return _COMMENT.sub(lambda comment: _WORDS.sub(words, comment[0]), text)


def with_html(text: str, rng: random.Random) -> str:
    """The text with the tags that a careless extraction leaves."""
    style = rng.randrange(3)
    lines = [line for line in text.split("\n") if line.strip()]
    if style == 0:
        return "".join(f"<p>{line}</p>\n" for line in lines)
    if style == 1:
        return "<br>".join(lines) + "<br/>&nbsp;"
    return re.sub(
        r"(?<= )(\w{4,})(?= )",
        lambda word: f'<a href="/{word[0]}">{word[0]}</a>' if rng.random() < 0.05 else word[0],
        "".join(f'<div class="text">{line}</div>\n' for line in lines),
    )


def variants(text: str, label: int, rng: random.Random) -> list[str]:
    """A text in the forms in which it is learned: whole, a few of its lines, and changed copies."""
    lines = text.split("\n")
    found = [text]
    if len(lines) > 3:
        start = rng.randrange(len(lines) - 2)
        found.append("\n".join(lines[start : start + rng.randint(2, 14)]))
    if label and (changed := chinese_comments(text, rng)) != text and rng.random() < 0.5:
        found.append(changed)
    if not label and rng.random() < 0.15:
        found.append(text.translate(_CYRILLIC))
    if not label and "<" not in text and rng.random() < 0.2:
        found.append(with_html(text[:6000], rng))
    return [piece for variant in found if len((piece := code_text.piece_of(variant)).strip()) >= 12]


class Features:
    """The texts as rows of a sparse matrix, each of length 1."""

    def __init__(self, counted: list[Counter[tuple[str, ...]]], names: list[tuple[str, ...]]) -> None:
        numbers = {name: number for number, name in enumerate(names)}
        rows, columns, values = [], [], []
        for row, counts in enumerate(counted):
            found = [(numbers[gram], n.bit_length()) for gram, n in counts.items() if gram in numbers]
            norm = math.sqrt(sum(value * value for _, value in found)) or 1
            for column, value in found:
                rows.append(row)
                columns.append(column)
                values.append(value / norm)
        shape = (len(counted), len(names))
        torch.sparse.check_sparse_tensor_invariants.disable()  # says that it is off, once
        self.matrix = torch.sparse_coo_tensor([rows, columns], values, shape).coalesce().to_sparse_csr()


def fit(matrix: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights and, last, the bias of a logistic regression with a penalty on the squares of the weights."""
    solution = torch.zeros(matrix.shape[1] + 1, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=150, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = (matrix @ solution[:-1, None]).squeeze(1) + solution[-1]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum() + _PENALTY * solution[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return solution.detach()


def train(records: list[tuple[str, str, int]], output: Path) -> None:
    """Fit on all frequent runs of tokens, keep those that weigh most, and fit again on these."""
    rng = random.Random(0)
    counted, labels, kinds = [], [], []
    for text, kind, label in records:
        for variant in variants(text, label, rng):
            counted.append(grams(variant))
            labels.append(float(label))
            kinds.append((label, kind))
    sizes, texts_with = Counter(kinds), Counter(gram for counts in counted for gram in counts)
    weights = torch.tensor([1 / math.sqrt(sizes[kind]) for kind in kinds])
    target = torch.tensor(labels)
    # Prose that is taken for code keeps the remains of its page; code that is taken for prose loses lines.
    balance = weights[target == 0].sum() / weights[target > 0].sum() / _PROSE_WEIGHT
    weights *= torch.where(target > 0, balance, 1.0)
    names = [gram for gram, n in texts_with.most_common(_CANDIDATES) if n >= _FEWEST_TEXTS]
    solution = fit(Features(counted, names).matrix, target, weights)
    importance = [
        abs(float(w)) * math.sqrt(texts_with[name]) for w, name in zip(solution[:-1], names, strict=True)
    ]
    order = sorted(range(len(names)), key=lambda number: -importance[number])[:FEATURES]
    names = sorted(names[number] for number in order)
    solution = fit(Features(counted, names).matrix, target, weights)
    lines = [f"{round((float(solution[-1]) - _CAUTION) * WEIGHT_SCALE)}\t\n"]
    for name, weight in zip(names, solution[:-1].tolist(), strict=True):
        if scaled := round(weight * WEIGHT_SCALE):
            lines.append(f"{scaled}\t{' '.join(name)}\n")
    output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(counted)} texts, {len(lines) - 1} weights")


def read(paths: list[Path], label: int | None) -> list[tuple[str, str, int]]:
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                record = json.loads(line)
                found.append((record["text"], record["kind"], record["label"] if label is None else label))
    return found


def report(records: list[tuple[str, str, int]]) -> None:
    """Print the fraction of texts that are told right, by kind."""
    right, all_texts = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for text, kind, label in records:
        all_texts[label, kind] += 1
        right[label, kind] += code_text.is_code_text(text) == bool(label)
    for key, n in sorted(all_texts.items()):
        print(f"{'code' if key[0] else 'prose'} {key[1]}: {right[key]} of {n} ({right[key] / n:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=Path, nargs="+", required=True)
    parser.add_argument("--prose", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=code_text.MODEL)
    args = parser.parse_args()
    train(read(args.programs, 1) + read(args.prose, 0), args.output)
    code_text.MODEL = args.output  # what was trained is what is measured
    code_text._model.cache_clear()
    report(read(args.test, None))


if __name__ == "__main__":
    main()
