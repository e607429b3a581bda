"""The HTTP server: what it answers equals what the command generates, and what it refuses. A real server and client."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.text import clean
from pretrain.corpus.chat import USER
from pretrain.errors import ConfigError
from pretrain.generation.sampling import Sampling
from pretrain.generation.service import Service
from pretrain.generation.writer import Writer
from pretrain.model.decoder import Decoder
from pretrain.trained import TrainedModel, load_trained
from support import ROOT
from support.trained_run import make_run, script

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

PROMPTS = ["It is a truth", "道可道", "def fibonacci(n: int)", ""]


class Brake(Decoder):
    """A decoder whose every step a test can hold up, slow down, or make fail."""

    gate: threading.Event
    n_steps: int
    pause_s: float
    fails: bool

    def hidden(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.n_steps += 1
        assert self.gate.wait(30) and not self.fails
        time.sleep(self.pause_s)
        return super().hidden(*arguments, **named)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("server") / "run"
    make_run(folder)
    return load_trained(folder)


@pytest.fixture(scope="module")
def model(trained: TrainedModel) -> Brake:
    decoder = trained.decoder(torch.device("cpu"), torch.float32)
    decoder.__class__ = Brake
    assert isinstance(decoder, Brake)
    decoder.gate, decoder.n_steps, decoder.pause_s, decoder.fails = threading.Event(), 0, 0.0, False
    decoder.gate.set()
    return decoder


@pytest.fixture(scope="module")
def client(trained: TrainedModel, model: Brake) -> Iterator[Any]:
    from pretrain.generation.server import Served, build_app

    service = Service(model, trained.tokenizer, batch_sequences=4, max_waiting=6)
    served = Served(
        name="run",
        tokenizer=trained.tokenizer,
        chat=trained.chat(),
        context_tokens=64,
        max_new_tokens=24,
        clean=clean,
    )
    app = build_app(service, served, ["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
    server.should_exit = True
    thread.join()
    service.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def greedy(trained: TrainedModel, model: Decoder, stop: tuple[str, ...] = ()) -> Writer:
    return Writer(
        model,
        trained.tokenizer,
        sampling=Sampling(temperature=0),
        max_new_tokens=12,
        stop=stop,
        chat=trained.chat(),
    )


def events(response: Any) -> list[Any]:
    """The events of a stream; the last one must say that it is complete."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --- what is answered ---


def test_completions_equal_what_the_writer_writes(client: Any, trained: TrainedModel, model: Brake) -> None:
    body = {"prompt": PROMPTS, "max_tokens": 12, "temperature": 0}
    found = client.post("/v1/completions", json=body).json()
    writer = greedy(trained, model)
    expected = writer.write([writer.after(prompt) for prompt in PROMPTS])
    assert [choice["text"] for choice in found["choices"]] == [answer.text for answer in expected]
    assert [choice["finish_reason"] for choice in found["choices"]] == [a.ending.value for a in expected]
    assert found["usage"]["completion_tokens"] == sum(len(answer.tokens) for answer in expected)
    assert found["model"] == "run"
    assert client.get("/v1/models").json()["data"][0]["id"] == "run"


@pytest.mark.parametrize("stop", [None, "e", ["zzz", "in"]])
def test_a_stream_is_the_whole_answer_in_pieces(client: Any, stop: Any) -> None:
    body = {"prompt": "It is a truth", "max_tokens": 12, "seed": 3, "n": 2, "stop": stop, "echo": True}
    whole = client.post("/v1/completions", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/completions", json=body | options))
    assert found[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c for event in found for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own][-1] == choice["finish_reason"]
        assert choice["text"].startswith("It is a truth")


def test_a_dialogue_gets_the_template(client: Any, trained: TrainedModel, model: Brake) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "cafe\u0301?"}]
    body = {"messages": turns, "max_completion_tokens": 12, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=body).json()
    writer = greedy(trained, model)
    (expected,) = writer.write(
        [
            writer.answer_to(
                [{"role": "system", "content": "Be brief."}, {"role": USER, "content": "caf\u00e9?"}]
            )
        ]
    )
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    found = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["delta"].get("content", "") for e in found for c in e["choices"]) == expected.text


def test_requests_at_the_same_time_get_what_each_gets_alone(client: Any) -> None:
    bodies = [{"prompt": prompt, "max_tokens": 9, "seed": 7} for prompt in PROMPTS]
    alone = [client.post("/v1/completions", json=body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(
            pool.map(lambda body: client.post("/v1/completions", json=body).json()["choices"], bodies)
        )
    assert together == alone


def test_without_a_seed_answers_differ(client: Any) -> None:
    body = {"prompt": "It", "max_tokens": 16, "temperature": 3}
    texts = {client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 25}, 400, "25"),
        ("completions", {"prompt": "a " * 999}, 400, "64"),
        ("completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs"),
        ("completions", {"prompt": ["a"] * 17}, 400, "prompt"),
        ("completions", {"prompt": "a", "n": 17}, 400, "n"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "stop": ""}, 400, "stop"),
        ("completions", [], 400, ""),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * (1 << 20)}]}, 413, "1,048,576"),
        ("nowhere", {}, 404, ""),
    ],
)
def test_a_wrong_request_gets_one_sentence(
    client: Any, path: str, body: Any, status: int, named: str
) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert named in message
    assert "Traceback" not in message and "pydantic" not in message


def test_a_web_page_cannot_use_the_server(client: Any) -> None:
    """Neither with a body that browsers send without asking, nor through a name that leads here."""
    body = json.dumps({"prompt": "a"})
    assert (
        client.post("/v1/completions", content=body, headers={"content-type": "text/plain"}).status_code
        == 415
    )
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400


def test_what_is_too_much_is_refused_and_what_waits_is_answered(client: Any, model: Brake) -> None:
    model.gate.clear()
    steps = model.n_steps
    body = {"prompt": "It", "max_tokens": 2}
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/v1/completions", json=body)
        wait_for(lambda: model.n_steps > steps)
        others = [pool.submit(client.post, "/v1/completions", json=body | {"n": 2}) for _ in range(4)]
        refused = []
        wait_for(lambda: bool(refused.extend(o for o in others if o.done() and o not in refused) or refused))
        model.gate.set()
        codes = sorted(answer.result().status_code for answer in [first, *others])
    assert codes == [200, 200, 200, 200, 429]
    assert refused[0].result().headers["retry-after"] == "5"


def test_nobody_writes_for_a_client_that_has_left(client: Any, model: Brake) -> None:
    model.pause_s = 0.2  # so that the server hears it before the last of 24 steps
    steps = model.n_steps
    body = {"prompt": "It", "max_tokens": 24, "stream": True, "temperature": 0}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    model.pause_s = 0.0
    assert model.n_steps - steps < 24


def test_a_batch_that_fails_is_told_and_the_next_one_is_answered(client: Any, model: Brake) -> None:
    model.fails = True
    answer = client.post("/v1/completions", json={"prompt": "a"})
    stream = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    model.fails = False
    assert answer.status_code == 500
    assert "[DONE]" not in stream.text and "error" in stream.text
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


# --- launch/serve.py ---


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    command = [sys.executable, "launch/serve.py", f"run_dir={tmp_path / 'run'}", "port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", said)
        assert found, said
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        answer = httpx.post(f"{found[0]}/chat/completions", json=body, timeout=30)
        assert answer.status_code == 200
        with pytest.raises(ConfigError, match=f"port={found[1]}"):
            script("serve").listen("127.0.0.1", int(found[1]))
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("interrupted")
