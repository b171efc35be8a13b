"""Where a server of a test may listen."""

import random
import socket


def free_port() -> int:
    """A port that nobody has, below those that a system hands out: nobody gets it while its server is down for a moment."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free between 10000 and 32000")
