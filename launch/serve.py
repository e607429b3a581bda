"""Serve a model over HTTP, to try it: `python launch/serve.py run_dir=DIR`

Programs that speak OpenAI's API can use it: completions and chat completions, whole or streamed, at
http://127.0.0.1:8000/v1. Requests are written in batches; what is too much is refused. The server asks for no key, so
it listens on this machine only, unless host= names another address.
Exit codes: 2 the input or configuration is wrong, 130 ended by Ctrl-C.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="the server has ended")

from omegaconf import MISSING

from pretrain.config import Precision, Weights, Which, run_command
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError
from pretrain.printing import say


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """What to serve, and where."""

    run_dir: PathText = MISSING
    """Folder of the run."""
    step: int | None = None
    """Step of the checkpoint to use; null means the newest good checkpoint."""
    checkpoint_target: PathText | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    which: Which = Which.newest
    """Checkpoint to use where `step` is not given: `newest`, or `best`, the one with the lowest held-out loss."""
    weights: Weights = Weights.trained
    """Weights to use: the `trained` ones, or their moving average `ema` if the run keeps it."""
    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine can use the server, without a key, if it is not a loopback
    address."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    max_new_tokens: int = 512
    """Largest number of tokens in a continuation."""
    batch_sequences: int = 8
    """Largest number of continuations that are written at a time."""
    max_waiting: int = 64
    """Largest number of continuations that wait; further requests are refused with status 429."""
    precision: Precision = Precision.auto
    """Precision of the computation. `auto` means bf16 where the device computes it in hardware, and fp32 otherwise."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port} must be at least 0 and less than 65536")


def main(config: ServeConfig) -> None:
    """Load the model and answer requests until the process is asked to end."""
    import uvicorn

    from data_tools.text import clean
    from pretrain.device import own_device
    from pretrain.generation.server import Served, build_app
    from pretrain.generation.service import Service
    from pretrain.model.kernels import DTYPES
    from pretrain.trained import check_writes_text, load_trained, precision_on

    listening = listen(config.host, config.port)
    trained = load_trained(
        config.run_dir, config.step, config.checkpoint_target, which=config.which, weights=config.weights
    )
    check_writes_text(trained, config.run_dir)
    if not trained.config.causal:
        raise ConfigError(
            f"run_dir={config.run_dir} was trained with objective=mlm, which fills masks and writes no text; "
            "launch/generate.py fills masks"
        )
    device = own_device()
    model = trained.decoder(device, DTYPES[precision_on(device, config.precision)])
    service = Service(
        model, trained.tokenizer, batch_sequences=config.batch_sequences, max_waiting=config.max_waiting
    )
    served = Served(
        name=Path(config.run_dir).resolve().name,
        tokenizer=trained.tokenizer,
        chat=trained.chat(),
        context_tokens=trained.sequence_length,
        max_new_tokens=config.max_new_tokens,
        clean=clean,
    )
    port = listening.getsockname()[1]
    is_local = ip_address(listening.getsockname()[0]).is_loopback
    # Other names may be any that lead to this machine.
    hosts = ["127.0.0.1", "localhost", "::1", config.host] if is_local else ["*"]
    app = build_app(service, served, hosts)
    shown = f"[{config.host}]" if ":" in config.host else config.host
    say(f"serving {config.run_dir}, step {trained.step}, at http://{shown}:{port}/v1; Ctrl-C ends it")
    say(
        "this server is for trying a model; for production, export it and serve the export with vLLM or SGLang"
    )
    if not is_local:
        say(f"warning: whoever can reach {config.host}:{port} can use this server, since it asks for no key")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"host={host} port={port} cannot be listened at: {error.strerror or error}"
        ) from error


if __name__ == "__main__":
    run_command(ServeConfig, main, doc=__doc__)
