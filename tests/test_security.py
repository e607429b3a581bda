"""What a hostile file, host or reader of logs must not achieve. docs/security.md says what is trusted.

One short life of a real run (trained on two ranks, stopped, resumed, evaluated, exported, asked to write, submitted
dry) is watched from outside; its pickles, sockets, command lines and files are looked at by tests of their own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xxhash
from launching import ROOT, Ranks, free_port
from tiny import TinyCorpus, events, run_arguments
from trained_run import make_run, train_tokenizer

from pretrain import checkpoint, checkpoint_folder, corpus_writer, manifest, shards, tokenizer, trained
from pretrain.config import ConfigError
from pretrain.corpus_check import verify_corpus
from pretrain.manifest import CorruptShardError, Manifest, load_manifest
from pretrain.shards import Corpus
from pretrain.tokenizer import Tokenizer

SHIM = ROOT / "tests" / "fault_shims" / "pickles"
SECRETS = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "SOME_TOKEN")


# ---- a watched life of a run -----------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What is seen in /proc, many times a second, of this machine's processes and one family's sockets."""

    command_lines: set[bytes] = field(default_factory=set)
    listening: set[tuple[str, str]] = field(default_factory=set)
    """(command line, address in hex as /proc/net/tcp has it) of the processes below this one."""

    def look(self) -> None:
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    self.command_lines.add((entry / "cmdline").read_bytes())
                    stat = (entry / "stat").read_text()
                    parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
                except OSError:  # it ended meanwhile
                    continue
        listeners = listening_sockets()
        for process in parents:
            ancestor = process
            while ancestor in parents and ancestor != os.getpid():
                ancestor = parents[ancestor]
            if ancestor == os.getpid() and process != ancestor:
                self.listening |= sockets_of(process, listeners)


def listening_sockets() -> dict[str, str]:
    """Inode -> local address of every listening TCP socket of this network namespace."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # LISTEN
                found[words[9]] = words[1]
    return found


def sockets_of(process: int, listeners: dict[str, str]) -> set[tuple[str, str]]:
    seen = set()
    try:
        name = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:[") and target[8:-1] in listeners:
                seen.add((name, listeners[target[8:-1]]))
    except OSError:  # it ended meanwhile
        pass
    return seen


def is_loopback(address: str) -> bool:
    """Of an address in /proc/net/tcp or tcp6: 127.0.0.0/8, ::1, or 127.0.0.0/8 mapped into IPv6."""
    host = address.split(":")[0]
    mapped = host.startswith("0000000000000000FFFF0000") and host.endswith("7F")
    return (len(host) == 8 and host.endswith("7F")) or host == "0" * 24 + "01000000" or mapped


@dataclass
class Life:
    folder: Path
    """Everything written: run, logs, output of each command, export, home and temporary folder."""
    run_dir: Path
    secret: str
    watch: Watch
    pickles: list[dict[str, Any]]
    """Each load of a pickle in any of its processes."""


@pytest.fixture(scope="module")
def life(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp("life")
    log = tmp_path_factory.mktemp("pickles") / "log"
    secret = secrets.token_hex(20)  # has the form of a W&B key
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    env = {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        **dict.fromkeys(SECRETS, secret),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(SHIM),
        "PICKLE_LOG": str(log),
        "OMP_NUM_THREADS": "1",
    }
    watch, ended = Watch(), threading.Event()

    def observe() -> None:
        while not ended.wait(0.1):
            watch.look()

    def run(name: str, *command: str, code: int = 0) -> None:
        with (folder / f"{name}.log").open("w") as output:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=output, timeout=240)
        assert done.returncode == code, (folder / f"{name}.log").read_text()

    run_dir = folder / "run"
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py"]
    arguments = run_arguments(
        corpus, run_dir, "logging.wandb=offline", "data.loader_workers=1", "total_steps=8"
    )
    observer = threading.Thread(target=observe)
    observer.start()
    try:
        run("first", *launcher, *arguments, "stop_at_step=4", code=75)
        run("second", *launcher, *arguments)
        here = [sys.executable, "launch/eval.py", f"run_dir={run_dir}"]
        run("eval", *here, f"input=[{corpus.heldout}]", "max_documents=1", "json=true")
        here[1] = "launch/export.py"
        run("export", *here, f"output={folder / 'export'}")
        here[1] = "launch/generate.py"
        run("generate", *here, "prompt=import ", "max_new_tokens=4")
        submitted = [a for a in arguments if not a.startswith("run_dir=")] + [
            f"run_dir={folder / 'submitted'}"
        ]
        cluster = ["cluster=slurm", "cluster.gpus_per_node=2", "dry_run=true"]
        run("submit", sys.executable, "launch/submit.py", *cluster, *submitted)
    finally:
        ended.set()
        observer.join()
    pickles = [json.loads(line) for line in log.read_text().splitlines()]
    return Life(folder, run_dir, secret, watch, pickles)


@pytest.mark.integration
def test_the_watched_run_did_what_it_should(life: Life) -> None:
    assert [e["event"] for e in events(life.run_dir) if e["event"] in ("started", "resumed", "finished")] == [
        "started",
        "resumed",
        "finished",
    ]
    assert (life.folder / "export" / "config.json").is_file()
    assert "#SBATCH" in (life.folder / "submit.log").read_text()


# ---- no pickle -------------------------------------------------------------------------------------------------------


def is_message_between_own_processes(record: dict[str, Any]) -> bool:
    """torch.distributed's object collectives, and multiprocessing's pipes to processes that we started."""
    callers = record["callers"]
    ours = ("/torch/distributed/distributed_c10d.py", "/multiprocessing/")
    return not record["on_disk"] and record["what"] != "torch.load" and any(o in callers[0] for o in ours)


@pytest.mark.integration
def test_no_pickle_is_loaded_but_messages_between_own_processes(life: Life) -> None:
    others = [record for record in life.pickles if not is_message_between_own_processes(record)]
    assert not others, others[:3]
    seen = {caller for record in life.pickles for caller in record["callers"][:1]}
    assert any(caller.endswith("distributed_c10d.py") for caller in seen)  # the shim was at work


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.load(open(path, 'rb'))",
        "import pickle; pickle.loads(open(path, 'rb').read())",
        "import pickle; pickle.Unpickler(open(path, 'rb')).load()",
        "from _pickle import loads; loads(open(path, 'rb').read())",
        "import torch; torch.load(path, weights_only=True)",
        "import numpy; numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_shim_sees_every_way_to_load_a_pickle(tmp_path: Path, code: str) -> None:
    write = (
        "import torch; torch.save(3, path)"
        if "torch" in code
        else "import pickle; pickle.dump(3, open(path, 'wb'))"
    )
    path, log = tmp_path / "file", tmp_path / "log"
    subprocess.run([sys.executable, "-c", f"path = {str(path)!r}; {write}"], check=True)
    env = {**os.environ, "PYTHONPATH": str(SHIM), "PICKLE_LOG": str(log)}
    subprocess.run([sys.executable, "-c", f"path = {str(path)!r}; {code}"], check=True, env=env)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert not all(is_message_between_own_processes(record) for record in records)


# ---- secrets ---------------------------------------------------------------------------------------------------------


def files_with(folder: Path, word: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and word.encode() in p.read_bytes()]


@pytest.mark.integration
def test_no_secret_is_written(life: Life) -> None:
    assert files_with(life.folder, life.secret) == []
    run_id = json.loads((life.run_dir / "run.json").read_text())["wandb_run_id"]
    recorded = [path.suffix for path in files_with(life.run_dir / "wandb", run_id)]
    assert ".wandb" in recorded  # W&B's payload was there to be searched


@pytest.mark.integration
def test_no_secret_is_in_a_command_line(life: Life) -> None:
    assert any(b"launch/train.py" in line for line in life.watch.command_lines)
    assert any(b"wandb-core" in line for line in life.watch.command_lines)
    assert not [line for line in life.watch.command_lines if life.secret.encode() in line]


# ---- sockets ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_ranks_of_one_host_listen_on_loopback_only(life: Life) -> None:
    of_ranks = {address for name, address in life.watch.listening if "launch/train.py" in name}
    assert len(of_ranks) >= 6  # twice: the store, and gloo of each rank
    open_to_others = {(n, a) for n, a in life.watch.listening if not is_loopback(a)}
    assert not open_to_others


def outward_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # a documentation address; UDP sends nothing here
        except OSError:
            return None
        return probe.getsockname()[0]


TWO_HOSTS = """
import sys; sys.path.insert(0, "{root}"); sys.path.insert(0, "{root}/tests")
from pretrain.distributed import gather_objects, init_world, shutdown_world
from test_security import listening_sockets, sockets_of
import os
world = init_world(60)
mine = sorted(address for _, address in sockets_of(os.getpid(), listening_sockets()))
print("LISTENING", gather_objects(mine, world), flush=True)
shutdown_world()
"""


def start_two_hosts(address: str) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks that take each other for ranks of two hosts."""
    port = str(free_port())
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-c", TWO_HOSTS.format(root=ROOT)]
    ranks = [
        subprocess.Popen(
            command, env=env | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    done = []
    for rank in ranks:
        try:
            out, err = rank.communicate(timeout=60 if not done or done[0].returncode == 0 else 0.1)
        except subprocess.TimeoutExpired:
            rank.kill()
            out, err = rank.communicate()
        done.append(subprocess.CompletedProcess(command, rank.returncode, out, err))
    return done


@pytest.mark.integration
def test_ranks_of_two_hosts_listen_on_the_interface_of_master_addr_only() -> None:
    address = outward_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    done = start_two_hosts(address)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    found = done[0].stdout.split("LISTENING ")[1]
    expected = socket.inet_aton(address)[::-1].hex().upper()
    addresses = [a for rank in json.loads(found.replace("'", '"')) for a in rank]
    assert len(addresses) == 3  # the store, and gloo of each rank
    assert {a.split(":")[0] for a in addresses} == {expected}


@pytest.mark.integration
def test_a_master_that_others_cannot_reach_is_refused() -> None:
    done = start_two_hosts("localhost")
    assert (
        "MASTER_ADDR=localhost is 127.0.0.1 on its own host, where other hosts cannot reach it"
        in done[0].stderr
    )


HOSTILE_LINES = [
    b"[]\n",
    b'"words"\n',
    b"\xff\xff\n",
    b"[" * 50_000 + b"\n",
    b'{"token": "guessed", "rank": 1, "dead": "killed", "reason": "a lie"}\n',
    b'{"rank": 1, "dead": "killed", "reason": "a lie"}\n',
    b'{"token": ' + b"1" * 200_000,
]


@pytest.mark.integration
def test_a_stranger_at_the_watchers_port_changes_nothing(tmp_path: Path) -> None:
    """Who connects to the watcher of rank 0 without the run's password is not heard, and keeps nothing alive."""
    with Ranks(
        2, "tests/watchdog_worker.py", str(tmp_path), "nothing", "0", log_dir=tmp_path / "logs"
    ) as ranks:
        hub, port = wait_for_hub(ranks.processes[0].pid)
        idle = socket.create_connection(("127.0.0.1", port))
        for line in HOSTILE_LINES:
            with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
                stranger.sendall(line)
                stranger.settimeout(5)
                while stranger.recv(1 << 16):  # until it is shown the door
                    pass
        assert ranks.processes[0].poll() is None  # it was all in time
        assert ranks.wait(120) == [0, 0], ranks.output()
        hub.wait(timeout=15)  # though the idle one is still connected
        idle.close()
    assert not (tmp_path / "events.jsonl").exists()


def wait_for_hub(rank: int) -> tuple[psutil.Process, int]:
    """The watcher of a rank and the port at which it listens, once the rank itself has left it to the watcher."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        mine = {address for _, address in sockets_of(rank, listening_sockets())}
        for child in psutil.Process(rank).children():
            for _, address in sockets_of(child.pid, listening_sockets()):
                if address not in mine:
                    return child, int(address.split(":")[1], 16)
        time.sleep(0.05)
    raise AssertionError("no watcher listens")


# ---- hashes before parsing -------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[str]]:
    """Make a function record that it was reached."""

    def record(owner: Any, name: str) -> list[str]:
        reached: list[str] = []
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            reached.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
        return reached

    return record


def test_a_wrong_tokenizer_never_reaches_sentencepiece(
    tmp_path: Path, calls: Callable[..., list[str]]
) -> None:
    """CVE-2026-1260: a model made with bad intent writes outside of its memory while it is parsed."""
    path = tmp_path / "tokenizer.model"
    model = train_tokenizer(path)
    parsed = calls(tokenizer, "SentencePieceProcessor")
    with pytest.raises(ConfigError, match=f"has sha256 {model.sha256}, where 000"):
        Tokenizer(path, "0" * 64)
    assert parsed == []
    Tokenizer(path, model.sha256)
    assert parsed == ["SentencePieceProcessor"]


@pytest.mark.parametrize("damaged", ["tokenizer.model", "state.json", "safetensors"])
def test_what_reads_a_run_parses_nothing_with_another_hash(
    tmp_path: Path, calls: Callable[..., list[str]], damaged: str
) -> None:
    make_run(tmp_path)
    folder = checkpoint.checkpoint_path(tmp_path, 3)
    path = tmp_path / damaged if damaged == "tokenizer.model" else next(folder.glob(f"*{damaged}"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    parsed = calls(tokenizer, "SentencePieceProcessor")
    states, tensors = calls(checkpoint, "read_state"), calls(checkpoint, "_read")
    with pytest.raises(ConfigError, match=damaged.replace(".", r"\.")):
        trained.load_trained(tmp_path)
    assert parsed == []
    assert (states, tensors) == (([], []) if damaged != "tokenizer.model" else (["read_state"], ["_read"]))


def test_a_wrong_index_is_not_parsed(folder: Path, calls: Callable[..., list[str]]) -> None:
    (path,) = (folder / "shards").glob("*.idx")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    parsed = calls(manifest, "parse_index")
    with pytest.raises(CorruptShardError, match="has another sha256"):
        Corpus(folder / "manifest.json").read(0, 0, 8)
    assert parsed == []


def test_a_wrong_member_is_not_parsed(folder: Path, calls: Callable[..., list[str]]) -> None:
    shard = next((folder / "shards").glob("*.tar"))
    with tarfile.open(shard) as tar:
        offset = tar.getmember("000000.doc").offset_data
    overwrite(shard, offset + 2, b"x")
    parsed = calls(shards, "parse_documents")
    with pytest.raises(CorruptShardError, match=r"000000\.doc has xxh3-64"):
        Corpus(folder / "manifest.json").documents(0)
    assert parsed == []


# ---- hostile corpora, whose hashes all fit ---------------------------------------------------------------------------


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of one shard with three chunks."""
    writer = corpus_writer.CorpusWriter(
        tmp_path / "corpus",
        tokenizer_sha256="0" * 64,
        vocab_size=100,
        bos_id=1,
        eos_id=2,
        chunk_tokens=64,
        sources=["code"],
    )
    for number in range(3):
        writer.add_document(np.arange(60), source="code", document_id=f"d{number}", text_bytes=99)
    writer.finish()
    return tmp_path / "corpus"


def forge(folder: Path, change: Callable[[Manifest], None]) -> None:
    """Change a manifest, with hashes that fit what is there now."""
    path = folder / "manifest.json"
    read = load_manifest(path)
    (shard,) = read.shards
    shard.index_sha256 = hashlib.sha256((folder / "shards" / shard.index_name).read_bytes()).hexdigest()
    shard.sha256 = hashlib.sha256((folder / "shards" / shard.name).read_bytes()).hexdigest()
    change(read)
    read.root_sha256 = read.compute_root_sha256()
    path.write_text(read.to_json())


def forge_index(folder: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change the index, a new array where `change` returns one, and make the manifest fit it."""
    (path,) = (folder / "shards").glob("*.idx")
    index = np.load(path)
    changed = change(index)
    saved = io.BytesIO()
    np.save(saved, index if changed is None else changed, allow_pickle=False)
    path.write_bytes(saved.getvalue())
    forge(folder, lambda _: None)


def test_an_honest_forgery_is_read(folder: Path) -> None:
    """So that what follows is refused for what it says, and not because of the forger's tools."""
    forge_index(folder, lambda index: None)
    assert verify_corpus(folder / "manifest.json") == []
    assert len(Corpus(folder / "manifest.json").read(0, 0, 64)) == 64


def set_at(*where: int, value: int) -> Callable[[np.ndarray], None]:
    def change(index: np.ndarray) -> None:
        index[where] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at(0, 0, 1, value=1 << 40), r"says that 000000\.tok has 1099511627776 bytes, its manifest 128"),
        (set_at(0, 0, 1, value=2), r"says that 000000\.tok has 2 bytes"),
        (
            set_at(1, 1, 1, value=1 << 40),
            r"says that 000001\.doc has 1099511627776 bytes, more than 67,108,864",
        ),
        (set_at(1, 1, 1, value=(1 << 64) - 1), r"says that 000001\.doc has 18446744073709551615 bytes"),
        (set_at(1, 0, 0, value=0), "members that do not follow one another"),
        (set_at(2, 0, 0, value=1 << 63), "members that do not follow one another"),
        (set_at(2, 1, 1, value=1 << 20), "does not fill the"),
        (lambda index: index[:2], "is no index of 3 chunks"),
        (lambda index: index.astype(np.float64), "is no index of 3 chunks"),
        (lambda index: np.zeros((300, 2, 3), "<u8"), r"has 14,528 bytes, where at most 272 are expected"),
    ],
)
def test_an_index_that_claims_what_cannot_be_is_refused(folder: Path, change: Any, words: str) -> None:
    forge_index(folder, change)
    with pytest.raises(CorruptShardError, match=rf"shard-00000\.idx.* {words}"):
        Corpus(folder / "manifest.json").read(0, 0, 8)
    assert len(verify_corpus(folder / "manifest.json")) == 1


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.type, header.linkname = size, kind, link
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (tar_header("../../000000.tok", 128), r"is '\.\./\.\./000000\.tok'"),
        (tar_header("/etc/000000.tok", 128), "is '/etc/000000.tok'"),
        (tar_header("000001.tok", 128), "is '000001.tok'"),
        (tar_header("000000.tok", 10 << 40), "with 10995116277760 bytes in its tar header"),
        (tar_header("000000.tok", 0, tarfile.SYMTYPE, "/etc/passwd"), "of type b'2'"),
        (b"\xff" * 512, "has no tar header"),
    ],
)
def test_a_member_that_other_tar_readers_would_see_otherwise_is_refused(
    folder: Path, header: bytes, words: str
) -> None:
    overwrite(folder / "shards/shard-00000.tar", 0, header)
    forge(folder, lambda _: None)
    (problem,) = verify_corpus(folder / "manifest.json")
    assert "shard-00000.tar: member 000000.tok " in problem
    assert words.replace("\\", "") in problem
    assert len(Corpus(folder / "manifest.json").read(0, 0, 64)) == 64  # training believes no tar header


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "{}", '{"ids": 3}', "\xff", '{"ids": ["a"], "starts": [1e999]}', "null"],
)
def test_documents_that_are_none_are_refused(folder: Path, content: str) -> None:
    with pytest.raises(CorruptShardError, match=r"x: 000000\.doc is no list of documents"):
        shards.parse_documents(
            content.encode("latin-1"), "x: 000000.doc", n_tokens=16, n_sources=1, masked=False
        )


@pytest.mark.parametrize("value", [-1, 1 << 62, 1.5, "9", True, None])
@pytest.mark.parametrize("name", ["n_chunks", "chunk_tokens", "n_tokens", "vocab_size"])
def test_a_count_that_is_none_is_refused(folder: Path, name: str, value: Any) -> None:
    forge(folder, lambda read: setattr(read, name, value))
    with pytest.raises(ConfigError, match=f"is not a corpus manifest: {name} is "):
        load_manifest(folder / "manifest.json")


def test_more_chunks_than_bytes_are_refused(folder: Path) -> None:
    def change(read: Manifest) -> None:
        read.n_chunks = read.shards[0].chunks = 1 << 21
        read.n_tokens = read.shards[0].tokens = read.n_chunks * read.chunk_tokens

    forge(folder, change)
    with pytest.raises(ConfigError, match="contradicts itself"):
        Corpus(folder / "manifest.json")


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_link_out_of_the_corpus_is_refused(folder: Path, suffix: str) -> None:
    path = folder / f"shards/shard-00000.{suffix}"
    outside = path.rename(folder.parent / path.name)
    path.symlink_to(outside)
    expected = rf"shard-00000\.{suffix} is a link to a file outside of .*/shards"
    with pytest.raises(CorruptShardError, match=expected):
        Corpus(folder / "manifest.json").read(0, 0, 8)
    assert any(
        "is a link to a file outside" in problem for problem in verify_corpus(folder / "manifest.json")
    )


# ---- hostile checkpoints, whose hashes all fit -----------------------------------------------------------------------


def forge_state(run_dir: Path, content: str | Callable[[dict[str, Any]], Any]) -> None:
    """Change state.json and make COMPLETE fit it."""
    path = checkpoint.checkpoint_path(run_dir, 3) / "state.json"
    if not isinstance(content, str):
        state = json.loads(path.read_text())
        content(state)
        content = json.dumps(state)
    path.write_text(content)
    complete = path.with_name("COMPLETE")
    listing = json.loads(complete.read_text())
    listing["files"]["state.json"] = {"bytes": path.stat().st_size, "xxh3_128": checkpoint.hash_file(path)}
    complete.write_text(json.dumps(listing))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda state: state["tensors"].update(x=[1 << 40]), "speaks of weights of 4,398,0"),
        (lambda state: state["tensors"].update(x=[1 << 20, 1 << 20, 1 << 20]), "speaks of weights of"),
        (lambda state: state["tensors"].update(x=[-5]), "speaks of weights of"),
        (lambda state: state["tensors"].update(x=[0.5]), "speaks of weights of"),
        (lambda state: state["tensors"].update(x="abc"), "is no state of a run"),
        (lambda state: state.pop("tensors"), "is no state of a run"),
        ("[" * 100_000, "is no state of a run"),
        ("{", "is no state of a run"),
        (" " * (checkpoint_folder.MAX_JSON_BYTES + 1), "is no state of a run .* bytes, more than"),
    ],
)
def test_a_state_that_claims_what_cannot_be_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    make_run(tmp_path)
    forge_state(tmp_path, lambda state: None)
    trained.load_trained(tmp_path)  # an honest forgery is read
    forge_state(tmp_path, content)
    with pytest.raises(checkpoint.CheckpointError, match=rf"state\.json {words}"):
        trained.load_trained(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, " " * (checkpoint_folder.MAX_JSON_BYTES + 1)])
def test_a_list_of_files_that_is_none_is_passed_over(tmp_path: Path, content: str) -> None:
    make_run(tmp_path)
    (checkpoint.checkpoint_path(tmp_path, 3) / "COMPLETE").write_text(content)
    (reason,) = checkpoint.find_latest(tmp_path).passed_over
    assert "COMPLETE cannot be read" in reason


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "name", "limit"),
    [
        (load_manifest, "manifest.json", manifest.MAX_MANIFEST_BYTES),
        (Tokenizer, "tokenizer.model", tokenizer.MAX_MODEL_BYTES),
    ],
)
def test_a_file_of_absurd_size_is_refused(tmp_path: Path, read: Any, name: str, limit: int) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, 10 << 30)  # takes no space; reading it would
    with pytest.raises(ConfigError, match=rf"{name} has 10,737,418,240 bytes, where at most {limit:,} are"):
        read(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A pipe would block for ever, a device never end."""
    path = tmp_path / "manifest.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="it is not a regular file"):
        load_manifest(path)


def test_hashes_of_the_tests_are_those_of_the_project(folder: Path) -> None:
    """xxh3 is no guard against intent: the manifest's sha256 of the index, which holds them, is."""
    (path,) = (folder / "shards").glob("*.idx")
    with tarfile.open(folder / "shards/shard-00000.tar") as tar:
        content = tar.extractfile("000000.tok").read()
    assert int(np.load(path)[0, 0, 2]) == xxhash.xxh3_64_intdigest(content)
