"""A free TCP port of this host for a process that is started next."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to connections (32768 and up): a port from among those may be taken
# between the moment it is chosen and the moment its owner listens.
PORTS = range(10_000, 29_000)


def free_port() -> int:
    """A port on which nothing listens at this moment, chosen at random; OSError where there is none."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"found no free TCP port on this host among 100 of {PORTS.start} to {PORTS.stop - 1}")
