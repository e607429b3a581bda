"""Evaluation sets in the layouts of OpenCompass, Hugging Face and lm-eval: which files are read, and which texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_tools.reading.evaluation_sets import FIELDS, evaluation_files, read_items
from data_tools.stages.decontamination.decontaminate import DecontaminateConfig, DecontaminateStage, collect
from pretrain.errors import ConfigError

QUESTION = "Which of the two brass kettles on the vicar's stove will whistle first?"
OPTION = "the one with the dented lid, because it holds less water"


def items_of(entry: Path, fields: list[str] = FIELDS) -> list[list[str]]:
    return [
        texts for file in evaluation_files(str(entry), fields) for texts in read_items(file.path, file.fields)
    ]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


ROW = f'"{QUESTION}",left,right,"{OPTION}",none,C\n'
LAYOUTS = {
    "mmlu/test/kettles_test.csv": ROW,
    "ceval/formal_ceval/val/kettles_val.csv": f"\ufeffid,question,A,B,C,D,answer\n0,{ROW}",
    "cmmlu/test/kettles.csv": f",Question,A,B,C,D,Answer\n0,{ROW}",
    "BBH/data/kettles.json": json.dumps(
        {"canary": "GUID", "examples": [{"input": QUESTION, "target": OPTION}]}
    ),
    "gsm8k/test.jsonl": json.dumps({"question": QUESTION, "answer": OPTION}),
    "ARC/ARC-c/ARC-Challenge-Dev.jsonl": json.dumps(
        {"id": "1", "question": {"stem": QUESTION, "choices": [{"text": OPTION, "label": "A"}]}}
    ),
    "GAOKAO-BENCH/data/kettles.json": json.dumps(
        {"keywords": "k", "example": [{"index": 0, "question": QUESTION}]}
    ),
    "math/math.json": json.dumps({"test/algebra/1.json": {"problem": QUESTION, "solution": OPTION}}),
    "hellaswag/hellaswag.jsonl": json.dumps({"ctx": QUESTION, "endings": [OPTION, "none"]}),
    "SQuAD2.0/dev-v2.0.json": json.dumps(
        {"data": [{"paragraphs": [{"context": "a passage", "qas": [{"question": QUESTION}]}]}]}
    ),
    "table/test.tsv": f"question\tanswer\n{QUESTION}\t{OPTION}\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_texts_of_a_layout_are_found(tmp_path: Path, layout: str) -> None:
    write(tmp_path / layout, LAYOUTS[layout])
    write(tmp_path / layout.split("/")[0] / "README.md", "# About")
    ((*texts,),) = items_of(tmp_path / layout.split("/")[0])
    assert texts[0] == QUESTION
    assert "a passage" not in texts
    assert OPTION in texts or "GAOKAO" in layout or "SQuAD" in layout


def test_programs_are_read_from_packed_lines(tmp_path: Path) -> None:
    item = {
        "task_id": "1",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "assert f()",
    }
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(item))
    assert items_of(tmp_path) == [["def f():\n", "    return 1\n"]]


def test_columns_of_a_hugging_face_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": [QUESTION], "choices": [["a", OPTION]], "subject": ["kettles"]})
    (tmp_path / "quiz/data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "quiz/data/test-00000-of-00001.parquet")
    parquet.write_table(table, tmp_path / "quiz/data/train-00000-of-00001.parquet")
    write(tmp_path / "quiz/dataset_infos.json", "{}")
    assert items_of(tmp_path / "quiz") == [[QUESTION, "a", OPTION]]
    (tmp_path / "quiz/data/test-00000-of-00001.parquet").unlink()
    assert len(items_of(tmp_path / "quiz")) == 1, "there is nothing but training data"
    (tmp_path / "saved").mkdir()
    with pyarrow.ipc.new_stream(tmp_path / "saved/data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    assert items_of(tmp_path / "saved") == [[QUESTION, "a", OPTION]]


def test_a_task_of_lm_eval_names_its_files_and_fields(tmp_path: Path) -> None:
    record = json.dumps({"riddle": QUESTION, "reply": OPTION, "answer": "not used by the task"})
    write(tmp_path / "data/test.jsonl", record)
    write(tmp_path / "data/train.jsonl", "[]")
    write(
        tmp_path / "_base.yaml",
        "dataset_path: json\ndoc_to_text: 'Q: {{riddle}} A:'\nprocess_docs: !function utils.process\n",
    )
    files = "dataset_kwargs:\n  data_files:\n    train: data/train.jsonl\n    test: data/test.jsonl\n"
    task = write(
        tmp_path / "kettles.yaml", f"include: _base.yaml\ntask: kettles\ndoc_to_target: reply\n{files}"
    )
    assert items_of(task) == [[QUESTION, OPTION]]
    folder = write(tmp_path / "folder.yaml", "dataset_path: data\ndoc_to_text: '{{ riddle }}'\n")
    assert items_of(folder) == [[QUESTION]]
    hub = write(tmp_path / "hub.yaml", "dataset_path: cais/mmlu\n")
    with pytest.raises(ConfigError, match=r"hub\.yaml names cais/mmlu, which is no local file"):
        items_of(hub)
    for content, message in (
        ("task: a\n", "names no dataset"),
        ("- a\n", "no YAML mapping"),
        ("a: [", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            items_of(write(tmp_path / "bad.yaml", content))
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        items_of(write(tmp_path / "bad.yaml", "include: bad.yaml\n"))


def test_files_without_items_are_all_named(tmp_path: Path) -> None:
    write(tmp_path / "quiz/a.jsonl", json.dumps({"question": QUESTION}))
    write(tmp_path / "quiz/b.jsonl", '{"frage": "Was?"}')
    write(tmp_path / "quiz/c.csv", "")
    with pytest.raises(ConfigError, match=r"b\.jsonl has none of the fields.*c\.csv has none of the fields"):
        collect(DecontaminateConfig(files=[str(tmp_path / "quiz")]))
    write(tmp_path / "empty/README.md", "nothing")
    with pytest.raises(ConfigError, match="empty has no file of an evaluation set"):
        collect(DecontaminateConfig(files=[str(tmp_path / "empty")]))
    write(tmp_path / "deep.json", '{"a":' * 900 + "1" + "}" * 900)
    with pytest.raises(ConfigError, match=r"deep\.json (cannot be read|has none)"):
        collect(DecontaminateConfig(files=[str(tmp_path / "deep.json")]))


def test_tables(tmp_path: Path) -> None:
    long = "a" * 200_000  # more than csv takes by default, a limit of the whole process
    table = tmp_path / "table.csv"
    table.write_text(f'\ufeffquestion\n"two\nlines"\n\n{long}\n')
    assert items_of(table) == [["two\nlines"], [long]]
    table.write_text(f'question\n"{long}')
    with pytest.raises(ConfigError, match=r"table\.csv cannot be read: the file ends within a quoted value"):
        items_of(table)
    table.write_bytes(b"question\nWas\nf\xe4llt\n")
    with pytest.raises(ConfigError, match=r"table\.csv cannot be read: the row at byte 13 is not UTF-8"):
        items_of(table)


def test_a_folder_is_one_set_with_all_of_its_items(tmp_path: Path) -> None:
    write(tmp_path / "mmlu/test/a_test.csv", ROW)
    write(tmp_path / "mmlu/test/b_test.csv", ROW.replace("kettles", "teapots") + "What?,1,2,3,4,A\n")
    config = DecontaminateConfig(files=[f"{tmp_path}/mmlu/"])
    index = collect(config)
    assert (index.names, index.items, index.too_short) == (["mmlu"], [3], [1])
    hits = DecontaminateStage(config).find(QUESTION.replace("kettles", "teapots"))
    assert [(hit.set_name, hit.item, round(hit.share, 2)) for hit in hits] == [
        ("mmlu", 1, 0.93),
        ("mmlu", 2, 1.0),
    ]
