"""The real rpc process, but for the daemon that it starts: the one over the scripted pipeline. Run by its path: rpc.py ROOT"""

import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

from trainer_node import rpc
from trainer_node.processes import start_detached

DAEMON = str(Path(__file__).with_name("daemon.py"))


def start_fake(argv: Sequence[str], *, cwd: Path, log: Path) -> "Popen[bytes]":
    root = argv[argv.index("--root") + 1]
    return start_detached([sys.executable, "-P", DAEMON, root], cwd=cwd, log=log)


if __name__ == "__main__":
    rpc.start_detached = start_fake
    rpc.serve_stdio(Path(sys.argv[1]))
