"""A real daemon over the scripted pipeline, in a hurry. Run by its path: daemon.py ROOT [IDLE_EXIT_S]"""

import sys
from pathlib import Path

from trainer_node.daemon import Daemon, Pace

PIPELINE = (sys.executable, "-P", str(Path(__file__).with_name("pipeline.py")))
PACE = Pace(tick_s=0.03, grace_s=0.6, backoff_s=0.05, start_s=10)

if __name__ == "__main__":
    idle = float(sys.argv[2]) if len(sys.argv) > 2 else None
    Daemon(Path(sys.argv[1]), idle_exit_s=idle, pipeline=PIPELINE, pace=PACE).serve()
