"""Finds a free TCP port on this host for a process that is about to start."""

from __future__ import annotations

import random
import socket

# This is below the ports that Linux assigns to outgoing connections (32768 and up). One of those could be taken
# between the moment it is chosen here and the moment its owner listens.
PORTS = range(10_000, 29_000)


def free_port() -> int:
    """A randomly chosen port on which nothing listens now. Raises OSError if 100 random ports are all in use."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"found no free TCP port on this host among 100 of {PORTS.start} to {PORTS.stop - 1}")
