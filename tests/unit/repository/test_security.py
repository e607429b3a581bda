"""What a hostile file, host or reader of logs must not achieve. docs/security.md says what is trusted.

One short life of a real run (trained on two ranks, stopped, resumed, evaluated, exported, asked to write, submitted
dry) is watched from outside; its pickles, sockets, command lines and files are looked at by tests of their own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.numpy import save_file

from pretrain import trained
from pretrain.checkpoint import folder as checkpoint_folder
from pretrain.checkpoint import tensors as checkpoint
from pretrain.corpus import manifest, shards, tokenizer
from pretrain.corpus import writer as corpus_writer
from pretrain.corpus.check import verify_corpus
from pretrain.corpus.manifest import CorruptShardError, Manifest, load_manifest
from pretrain.corpus.shards import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.data.history import ReadHistory
from pretrain.data.state import OrderState
from pretrain.errors import ConfigError
from pretrain.model.decoder import Decoder
from support import ROOT
from support.launching import Ranks, free_port
from support.run_states import run_state
from support.sockets import listening_sockets, sockets_of
from support.tiny import TinyCorpus, events, run_arguments
from support.trained_run import make_run, train_tokenizer

SHIM = ROOT / "tests" / "support" / "fault_shims" / "pickles"
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
from support.sockets import listening_sockets, sockets_of
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
    assert "MASTER_ADDR=localhost" in done[0].stderr and "127.0.0.1" in done[0].stderr


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
    """Who connects to the watcher of rank 0 without the run's password is not heard, and keeps nothing alive; more
    silent ones than that process may have descriptors do not end it."""
    with Ranks(
        2,
        "tests/support/workers/watchdog_worker.py",
        str(tmp_path),
        "nothing",
        "0",
        log_dir=tmp_path / "logs",
    ) as ranks:
        hub, port = wait_for_hub(ranks.processes[0].pid)
        resource.prlimit(hub.pid, resource.RLIMIT_NOFILE, (1024, 1024))
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(1100)]
        for line in [*HOSTILE_LINES, *(secrets.token_bytes(100) + b"\n" for _ in range(100))]:
            with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
                stranger.sendall(line)
                stranger.settimeout(5)
                while stranger.recv(1 << 16):  # until it is shown the door
                    pass
        assert ranks.processes[0].poll() is None  # it was all in time
        assert ranks.wait(120) == [0, 0], ranks.output()
        hub.wait(timeout=15)  # though idle ones are still connected
        for stranger in idle:
            stranger.close()
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
    with pytest.raises(ConfigError, match=f"has sha256 {model.sha256}, .*000"):
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
    parsed = calls(tokenizer, "SentencePieceProcessor")
    states, tensors = calls(checkpoint, "read_state"), calls(checkpoint, "_fill")
    trained.load_trained(tmp_path)
    assert (states, tensors) == (["read_state"], ["_fill"])
    assert parsed == ["SentencePieceProcessor"]
    for made in (parsed, states, tensors):
        made.clear()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=damaged.replace(".", r"\.")):
        trained.load_trained(tmp_path)
    assert parsed == tensors == []
    assert states == (["read_state"] if damaged == "tokenizer.model" else [])


def test_a_wrong_index_is_not_parsed(folder: Path, calls: Callable[..., list[str]]) -> None:
    (path,) = (folder / "shards").glob("*.idx")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    parsed = calls(manifest, "parse_index")
    with pytest.raises(CorruptShardError, match="different sha256"):
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
        (
            set_at(0, 0, 1, value=1 << 40),
            r"000000\.tok has 1099511627776 bytes.* 128",
        ),
        (set_at(0, 0, 1, value=2), r"000000\.tok has 2 bytes"),
        (
            set_at(1, 1, 1, value=1 << 40),
            r"000001\.doc has 1099511627776 bytes.* 67,108,864",
        ),
        (set_at(1, 1, 1, value=(1 << 64) - 1), r"000001\.doc has 18446744073709551615 bytes"),
        (set_at(1, 0, 0, value=0), "members that do not follow one another"),
        (set_at(2, 0, 0, value=1 << 63), "members that do not follow one another"),
        (set_at(2, 1, 1, value=1 << 20), "does not fill the"),
        (lambda index: index[:2], "index of 3 chunks"),
        (lambda index: index.astype(np.float64), "index of 3 chunks"),
        (lambda index: np.zeros((300, 2, 3), "<u8"), r"14,528 bytes.* 272 "),
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
    with pytest.raises(CorruptShardError, match=r"x: 000000\.doc is .*list of documents"):
        shards.parse_documents(
            content.encode("latin-1"), "x: 000000.doc", n_tokens=16, n_sources=1, masked=False
        )


@pytest.mark.parametrize("value", [-1, 1 << 62, 1.5, "9", True, None])
@pytest.mark.parametrize("name", ["n_chunks", "chunk_tokens", "n_tokens", "vocab_size"])
def test_a_count_that_is_none_is_refused(folder: Path, name: str, value: Any) -> None:
    forge(folder, lambda read: setattr(read, name, value))
    with pytest.raises(ConfigError, match=f"manifest\\.json .*: {name} is "):
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


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Decoder]:
    """A run folder as training leaves it, not to be changed, and its model."""
    run_dir = tmp_path_factory.mktemp("honest") / "run"
    decoder = make_run(run_dir)
    config = checkpoint.find_latest(run_dir).verified.state["config"]
    (run_dir / "config.json").write_text(json.dumps(config))
    return run_dir, decoder


@pytest.fixture
def run_dir(honest: tuple[Path, Decoder], tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(honest[0], tmp_path / "run")


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


def changed(*where: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value into nested ones."""

    def change(state: dict[str, Any]) -> None:
        place: Any = state
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = value

    return change


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed("tensors", "x", value=[1 << 40]), "weights of 4,398,0"),
        (changed("tensors", "x", value=[1 << 20, 1 << 20, 1 << 20]), "weights of .* bytes"),
        (changed("tensors", "x", value=[-5]), r"tensors\.x\.0 is -5"),
        (changed("tensors", "x", value=[0.5]), r"tensors\.x\.0 is 0\.5"),
        (changed("tensors", "x", value="abc"), r"tensors\.x is 'abc'"),
        (changed("tensors", "x", value=[1] * 9), r"tensors\.x is "),
        (changed("tensors", value={}), "does not match the weights"),
        (lambda state: state.pop("tensors"), "tensors is missing"),
        (changed("tokenizer_sha256", value=None), "tokenizer_sha256 is None"),
        (lambda state: state.pop("tokenizer_sha256"), "tokenizer_sha256 is missing"),
        (changed("tokenizer_sha256", value="ab"), "tokenizer_sha256 is 'ab'"),
        (changed("step", value=-1), "step is -1"),
        (changed("step", value=True), "step is True"),
        (changed("step", value="3"), "step is '3'"),
        (changed("step", value=10**30), "step is 10"),
        (changed("sequence_length", value=0), "sequence_length is 0"),
        (changed("world_size", value=0), "world_size is 0"),
        (changed("run_id", value="../../x"), "run_id is "),
        (changed("wandb_run_id", value="a\x1b[2J"), "wandb_run_id is "),
        (changed("order", value=[]), r"order is \[\]"),
        (changed("config", value=[]), r"config is \[\]"),
        (changed("config", value={}), "the stored configuration "),
        (changed("config", "model", "n_layers", value=3_000_000), r"n_layers=3000000 .*10,000"),
        (changed("config", "model", "n_layers", value=9_999), "does not match the weights"),
        (changed("config", "model", "d_model", value=1 << 40), "d_model=1099511627776 "),
        (changed("config", "model", "vocab_size", value=None), "does not match the weights"),
        (
            changed("config", "data", "manifest", value="${oc.env:HOME}"),
            r"has '\$\{oc\.env:HOME\}' in data\.manifest",
        ),
        (changed("config", "seed", value="${oc.env:HOME}"), "in seed"),
        (changed("config", "${oc.env:HOME}", value=1), "in a key"),
        (changed("config", "_target_", value="os.system"), "the stored configuration .*_target_"),
        (changed("more", value=1), "more is unknown"),
        ("[" * 50_000, "recursion limit"),
        ("{", "EOF while parsing"),
        (" " * (checkpoint_folder.MAX_JSON_BYTES + 1), "more than 268,435,456 bytes"),
    ],
)
def test_a_state_that_claims_what_cannot_be_is_refused(run_dir: Path, content: Any, words: str) -> None:
    trained.load_trained(run_dir)  # an honest one is read
    forge_state(run_dir, content)
    with pytest.raises(ConfigError, match=words) as caught:
        trained.load_trained(run_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("lanes", value=0), "lanes is 0"),
        (changed("lanes", value=1 << 40), "lanes is 1099511627776"),
        (changed("stages", value=[]), r"stages is \[\]"),
        (changed("stages", 0, "batch_sequences", value=2_000_000_000), "batch_sequences is 2000000000"),
        (changed("stages", 0, "weights", value=[1.0] * 9), "contradicts itself"),
        (changed("stages", 0, "weights", value=[float("nan")]), "weights"),
        (changed("stages", 0, "weights", value=[-1.0]), "weights"),
        (changed("stages", 0, "first_sample", value=7), "contradicts itself"),
        (changed("manifest_sha", value=["../x"]), r"manifest_sha\.0 is '\.\./x'"),
        (changed("consumed_samples", value=-1), "consumed_samples is -1"),
        (changed("window_chunks", value=0), "window_chunks is 0"),
        (changed("chunk_tokens", value=[0]), r"chunk_tokens\.0 is 0"),
        (changed("passed_over", value=[[3, 1]]), "end before they begin"),
        (changed("passed_over", value=[[1, 2, 3]]), r"passed_over\.0 is "),
        (changed("substitutions", value=[{"source": 9}]), r"substitutions\.0\."),
        (changed("schema", value=3), "has schema 3"),
        (changed("more", value=3), "more is unknown"),
    ],
)
def test_an_order_that_cannot_be_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    values = run_state(3, {})["order"]
    assert OrderState.from_dict(values).to_dict() == values
    change(values)
    with pytest.raises(ConfigError, match=words):
        OrderState.from_dict(values)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        " " * (checkpoint_folder.MAX_JSON_BYTES + 1),
        "null",
        '{"format_version": 1, "files": []}',
        '{"format_version": 1, "files": {"a/b": {"bytes": 1, "xxh3_128": "%s"}}}' % ("0" * 32),
        '{"format_version": 1, "files": {"a\\u0000": {"bytes": 1, "xxh3_128": "%s"}}}' % ("0" * 32),
        '{"format_version": 1, "files": {"a": {"bytes": -1, "xxh3_128": "%s"}}}' % ("0" * 32),
        '{"format_version": 1, "files": {"a": {"bytes": 1, "xxh3_128": null}}}',
        '{"format_version": 1, "files": {"a": {"bytes": 1, "xxh3_128": "%s"}}}' % ("0" * 32),
    ],
)
def test_a_list_of_files_that_is_none_is_passed_over(run_dir: Path, content: str) -> None:
    (checkpoint.checkpoint_path(run_dir, 3) / "COMPLETE").write_text(content)
    (reason,) = checkpoint.find_latest(run_dir).passed_over
    assert reason.startswith("step-00000003: COMPLETE ")
    assert "\n" not in reason


def replace_by(path: Path, kind: str) -> None:
    """Put what is not a file of the folder in the place of one."""
    outside = path.rename(path.parent.parent.parent / f"outside-{path.name}")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "link":
            path.symlink_to(outside)
        case "folder":
            path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
@pytest.mark.parametrize("name", ["COMPLETE", "state.json", "safetensors"])
def test_a_checkpoint_is_made_of_regular_files_of_its_own(run_dir: Path, name: str, kind: str) -> None:
    (path,) = checkpoint.checkpoint_path(run_dir, 3).glob(f"*{name}")
    replace_by(path, kind)
    assert checkpoint.find_latest(run_dir).path is None
    with pytest.raises(ConfigError, match=f"step-00000003: .*{name}"):
        trained.load_trained(run_dir)


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_run_folder_that_is_none_is_refused(run_dir: Path, name: str, kind: str) -> None:
    path = run_dir / name
    if kind != "link" or name == "config.json":  # a link to the right tokenizer has the right hash
        replace_by(path, kind)
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            trained.load_trained(run_dir)


@pytest.mark.parametrize("content", ["[]", "{}", '{"checkpoint": {"target": 3}}', "[" * 100_000, "\xff"])
def test_a_configuration_of_a_run_that_is_none_is_refused(run_dir: Path, content: str) -> None:
    (run_dir / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not the configuration of a run"):
        trained.load_trained(run_dir)


def test_files_that_are_not_listed_are_named_and_not_read(
    run_dir: Path, honest: tuple[Path, Decoder]
) -> None:
    """The intruder's weights have the names and shapes of all others, and a name that comes last."""
    folder = checkpoint.checkpoint_path(run_dir, 3)
    (tensors,) = folder.glob("*.safetensors")
    with safe_open(tensors, "np") as file:
        forged = {name: file.get_tensor(name) + 1 for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    found = checkpoint.find_latest(run_dir).verified
    assert found is not None
    save_file(forged, folder / "zzz-00001.safetensors", metadata)
    assert "does not list 'zzz-00001.safetensors'" in str(checkpoint.verify(folder))
    shapes = {name: tuple(shape) for name, shape in found.state["tensors"].items()}
    flat = {f"weight.{name}": torch.zeros(torch.Size(shape).numel()) for name, shape in shapes.items()}
    checkpoint._read(found, flat, checkpoint.ALONE, no_dist=True)  # verified before the intruder came
    for name, weight in honest[1].named_parameters():
        assert torch.equal(flat[f"weight.{name}"], weight.detach().flatten())


def test_a_file_that_changes_after_its_hash_is_noticed(run_dir: Path) -> None:
    found = checkpoint.find_latest(run_dir).verified
    assert found is not None
    (tensors,) = found.path.glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.unlink()
    tensors.write_bytes(content[:-1] + b"x")
    flat = {
        f"weight.{name}": torch.zeros(torch.Size(shape).numel())
        for name, shape in found.state["tensors"].items()
    }
    with pytest.raises(checkpoint.CheckpointError, match="was changed while it was read"):
        checkpoint._read(found, flat, checkpoint.ALONE, no_dist=True)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", (1 << 62).to_bytes(8, "little"), b""]
)
def test_tensors_that_are_none_are_one_sentence(run_dir: Path, header: bytes) -> None:
    folder = checkpoint.checkpoint_path(run_dir, 3)
    (tensors,) = folder.glob("*.safetensors")
    tensors.write_bytes(header + tensors.read_bytes()[len(header) :] if header else b"")
    listing = json.loads((folder / "COMPLETE").read_text())
    listing["files"][tensors.name] = {
        "bytes": tensors.stat().st_size,
        "xxh3_128": checkpoint.hash_file(tensors),
    }
    (folder / "COMPLETE").write_text(json.dumps(listing))
    with pytest.raises((ConfigError, checkpoint.CheckpointError), match="step-00000003: ") as caught:
        trained.load_trained(run_dir)
    assert "\n" not in str(caught.value)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "name", "limit"),
    [
        (load_manifest, "manifest.json", manifest.MAX_MANIFEST_BYTES),
        (Tokenizer.trusted, "tokenizer.model", tokenizer.MAX_MODEL_BYTES),
    ],
)
def test_a_file_of_absurd_size_is_refused(tmp_path: Path, read: Any, name: str, limit: int) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, 10 << 30)  # takes no space; reading it would
    with pytest.raises(ConfigError, match=rf"{name} has 10,737,418,240 bytes, .*{limit:,} "):
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


# ---- a hostile run, opened by every command --------------------------------------------------------------------------


class Listener:
    """An HTTP server on loopback that notes what it is asked for, and answers that it is not there."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                listener.asked.append(repr(self.raw_requestline))
                if self.raw_requestline and self.parse_request():
                    self.send_error(404)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.server.shutdown()
    found.server.server_close()


CANARY = "canary7f3a9c"
PLACES = (
    "{url}/${{oc.env:SOME_TOKEN}}/manifest.json",
    "{url}/manifest.json",
    "simplecache::{url}/manifest.json",
)


@pytest.mark.parametrize("place", PLACES)
def test_what_only_a_run_names_is_not_asked_for(
    run_dir: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    where = place.format(url=listener.url)
    forge_state(run_dir, changed("config", "data", "manifest", value=where))
    with pytest.raises(ConfigError) as caught:
        ReadHistory.of_run(run_dir)
    forge_state(run_dir, changed("config", "data", "manifest", value="x/manifest.json"))
    config = json.loads((run_dir / "config.json").read_text())
    changed("checkpoint", "target", value=where)(config)
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught_too:
        trained.load_trained(run_dir)
    assert CANARY not in f"{caught.value}{caught_too.value}"
    assert listener.asked == []


@pytest.mark.integration
def test_no_command_sends_or_shows_a_secret_for_a_hostile_run(
    run_dir: Path, corpus: TinyCorpus, listener: Listener, tmp_path: Path
) -> None:
    """A run whose every place for a path names a server: nothing is asked for, and the secret is nowhere."""
    where = PLACES[0].format(url=listener.url)

    def change(state: dict[str, Any]) -> None:
        for keys in (("data", "manifest"), ("data", "cache_dir"), ("evaluation", "manifest"), ("init_from",)):
            changed("config", *keys, value=where)(state)
        changed("config", "checkpoint", "target", value=where)(state)

    forge_state(run_dir, change)
    state = json.loads((checkpoint.checkpoint_path(run_dir, 3) / "state.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(state["config"]))
    linked = shutil.copytree(run_dir, tmp_path / "linked")  # its config.json is honest
    (linked / "config.json").unlink()
    train = run_arguments(corpus, run_dir)
    commands: list[tuple[str, list[str], set[int]]] = [
        (f"{name} {folder.name}", [f"launch/{script}.py", f"run_dir={folder}", *more], codes)
        for folder, codes in ((run_dir, {2}), (linked, {0, 2}))
        for name, script, *more in (
            ("eval", "eval", f"input=[{corpus.heldout}]"),
            ("export", "export", f"output={tmp_path / 'export'}-{folder.name}"),
            ("generate", "generate", "prompt=import ", "max_new_tokens=2"),
            ("provenance", "provenance", "step=1"),
        )
    ]
    commands += [
        ("resume", ["launch/train.py", *train], {1, 2}),
        (
            "init_from",
            ["launch/train.py", *run_arguments(corpus, tmp_path / "new", f"init_from={run_dir}")],
            {2},
        ),
        ("supervise", ["launch/supervise.py", "--", sys.executable, "launch/train.py", *train], {1, 2}),
    ]
    (tmp_path / "home").mkdir()
    env = {
        **os.environ,
        **dict.fromkeys(SECRETS, CANARY),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path),
    }
    watch = Watch()
    running = []
    for name, arguments, codes in commands:
        with (tmp_path / f"{name}.log").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
            )
        running.append((name, process, codes))
        while process.poll() is None:
            watch.look()
            time.sleep(0.1)
    for name, process, codes in running:
        text = (tmp_path / f"{name}.log").read_text()
        assert process.returncode in codes, f"{name}: {text}"
        assert "Traceback" not in text, f"{name}: {text}"
    assert listener.asked == []
    assert files_with(tmp_path, CANARY) == []
    assert not [line for line in watch.command_lines if CANARY.encode() in line]
    assert any(b"launch/provenance.py" in line for line in watch.command_lines)
