"""A real S3 server on loopback: SeaweedFS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

from support.launching import free_port

KEYS = {
    "AWS_ACCESS_KEY_ID": "labkey",
    "AWS_SECRET_ACCESS_KEY": "labsecret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
OFF = ["-s3.port.iceberg=0", "-s3.port.lance=0"]
"""Services of the server besides S3. They are off, because their ports would be the same for every server."""


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """URL of an empty bucket, which is stored in `folder`. Environment variables tell clients how to reach it."""
    (folder / "data").mkdir()
    credentials = {
        "accessKey": KEYS["AWS_ACCESS_KEY_ID"],
        "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"],
    }
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "lab", "credentials": [credentials], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    port = free_port()
    where = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", "-master.telemetry=false"]
    ports = [f"-master.port={free_port()}", f"-volume.port={free_port()}", f"-filer.port={free_port()}"]
    limits = ["-master.volumeSizeLimitMB=64", "-volume.max=20"]
    command = [
        str(Path(sys.executable).parent / "weed"),
        "-logtostderr=true",
        "server",
        *where,
        *ports,
        *limits,
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-filer", "-s3", f"-s3.port={port}", *OFF, f"-s3.config={folder / 's3.json'}"],
            stdout=log,
            stderr=log,
        )
    variables = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}/healthz", server, folder / "log")
        s3fs.S3FileSystem.clear_instance_cache()  # drop connections that another test has opened
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    finally:
        server.kill()  # not terminate(), after which it takes 25 s to end
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _wait_until_it_answers(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
