"""A folder that someone else has made, with links where a command writes: nothing outside of it is changed."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools import curate, remove
from data_tools.building import workspace
from data_tools.building.workspace import Recipe
from data_tools.curation.phases import OutputFormat
from pretrain import files
from pretrain.corpus.node_cache import NodeCache
from pretrain.errors import ConfigError
from pretrain.files import let_umask_decide, open_lock, published_together, refuse_links, touch
from pretrain.reliability import heartbeat
from pretrain.reliability.json_lines import JsonLines
from pretrain.reliability.run_lock import lock_run
from pretrain.reliability.starts import write_json
from pretrain.reliability.supervisor import Supervisor, _start
from pretrain.reliability.watcher import Watcher

PRECIOUS = "precious\nand not ended"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of mine, with a file in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text(PRECIOUS)
    return folder


def assert_untouched(outside: Path) -> None:
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"file": PRECIOUS}


NAMES = [
    "events.jsonl", "metrics.jsonl", "lock", "run.json", ".run.json.tmp", "config.json", "stop", "stacks",
    "stacks/attempt-001", "attempts", "attempts/001", "attempts/lock", "attempts/summary.json", "ledger",
    "ledger/rank-00000.jsonl", "checkpoints", "checkpoints/.step-00000001.tmp", "submit", "wandb",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["file", ".", "nothing"])
def test_a_run_is_not_begun_in_a_folder_with_links_out_of_it(
    tmp_path: Path, outside: Path, name: str, to: str
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).symlink_to(outside / to)
    with pytest.raises(ConfigError, match=f"{name} is a link") as caught:
        lock_run(run_dir)
    assert "checkpoint.target" in str(caught.value)
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        Supervisor([sys.executable], run_dir, max_failures=1, grace_s=1).run()
    assert [path.name for path in run_dir.rglob("*") if not path.is_dir()] in ([Path(name).name], [])
    assert_untouched(outside)


def test_links_within_a_run_folder_and_to_it_are_taken(tmp_path: Path) -> None:
    (tmp_path / "disk" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "disk" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "disk" / "wandb" / "run-1" / "debug-core.log").symlink_to("/tmp")  # as W&B has its own
    (tmp_path / "run").symlink_to("disk")
    lock_run(tmp_path / "run")
    (tmp_path / "disk" / "wandb" / "out").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="wandb/out is a link"):
        lock_run(tmp_path / "run")


def test_what_writes_follows_no_link(
    tmp_path: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the folder was not looked at before."""
    link = tmp_path / "link"
    link.symlink_to(outside / "file")
    JsonLines(link).append({"event": "x"})
    assert "cannot be written" in capsys.readouterr().err
    for write in (open_lock, touch):
        with pytest.raises(OSError):
            write(link)
    (tmp_path / ".a.json.tmp").symlink_to(outside / "file")
    write_json(tmp_path / "a.json", {})
    os.waitpid(_start(["true"], link), 0)
    assert stat.S_IMODE(link.lstat().st_mode) == 0o600  # what a command prints may be secret
    assert_untouched(outside)


def test_a_watcher_follows_no_link(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "events.jsonl").symlink_to(outside / "file")
    (run_dir / "stacks").symlink_to(outside)
    watcher: Any = object.__new__(Watcher)
    watcher.run_dir, watcher.rank, watcher.host, watcher.pid, watcher.attempt = (
        run_dir,
        1,
        "h",
        os.getpid(),
        1,
    )
    watcher.dead, watcher.stacks = False, os.memfd_create("stacks")
    watcher.progress = os.memfd_create("progress")
    os.ftruncate(watcher.progress, heartbeat.SIZE_BYTES)
    watcher._ask_for_stacks = lambda: os.write(watcher.stacks, b"stacks in <module>\n")
    watcher._say({"rank": 1, "cause": "hang", "reason": "x"})
    watcher._dump()
    assert_untouched(outside)
    (run_dir / "stacks").unlink()
    watcher._dump()
    assert (run_dir / "stacks" / "attempt-001" / "rank-00001.txt").read_text().endswith("in <module>\n")


@pytest.mark.parametrize("to", [".", "nothing"])
def test_corpora_are_not_prepared_through_links(tmp_path: Path, outside: Path, to: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / workspace.WORK_FOLDER).symlink_to(outside / to)
    with pytest.raises(ConfigError, match="is a link"), workspace.open_work(output, Recipe({}, {})):
        pytest.fail("it was opened")
    (output / curate.WORK).unlink(missing_ok=True)
    (output / curate.WORK).mkdir()
    (output / curate.WORK / "lock").symlink_to(outside / "file")
    with pytest.raises(ConfigError, match="lock is a link"), curate._work(output, {}, OutputFormat.jsonl):
        pytest.fail("it was opened")
    assert_untouched(outside)


def test_documents_are_not_removed_through_links(tmp_path: Path, outside: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("manifest.json", "prepare.json"):
        (corpus / name).write_text("{}")
    (corpus / workspace.WORK_FOLDER).symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link"):
        remove.remove(corpus, {"a"})
    assert_untouched(outside)


def test_an_earlier_result_that_is_a_link_is_replaced(tmp_path: Path, outside: Path) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    (corpus / "shards").mkdir(parents=True)
    (corpus / workspace.REPORT_NAME).write_text("{}")
    output.mkdir()
    (output / "shards").symlink_to(outside)
    workspace.publish(corpus, output)
    assert (output / "shards").is_dir() and not (output / "shards").is_symlink()
    assert_untouched(outside)


def test_an_export_follows_no_link_and_can_be_read_by_those_whom_the_umask_lets(
    tmp_path: Path, outside: Path
) -> None:
    for name in (".export.tmp", ".export.old"):
        (tmp_path / name).symlink_to(outside)
    before = os.umask(0o027)
    try:
        with published_together(tmp_path / "export") as folder:
            (folder / "model.safetensors").touch(0o600)
            (folder / "config.json").touch()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "export").iterdir()}
    assert modes == {0o640}
    assert_untouched(outside)


def test_the_umask_is_asked_for_and_not_changed(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        (tmp_path / "f").touch(0o600)
        let_umask_decide(tmp_path / "f")
        assert os.umask(0o022) == 0o077
        let_umask_decide(tmp_path / "f")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


def test_a_cache_is_not_where_another_user_has_linked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0:
        pytest.skip("giving a link to another user takes root")
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to("mine")
    NodeCache(tmp_path / "cache", "0" * 64, 1)
    shutil.rmtree(tmp_path / "mine" / f"corpus-{'0' * 32}")
    os.lchown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(ConfigError, match=r"data\.cache_dir="):
        NodeCache(tmp_path / "cache", "0" * 64, 1)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_vanishes_meanwhile_is_none(tmp_path: Path) -> None:
    refuse_links(tmp_path / "nothing", tmp_path, "")
    assert files.is_inside(tmp_path / "nothing", tmp_path)
