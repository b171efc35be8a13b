"""Three campaigns on one Gemini key over whole minutes; one is killed with -9. Together they stay under its limit.

    python tests/bench/bench_shared_rpm.py [RPM]       (120)

The server (tests/fakes/mock_models.py) allows RPM requests in any 60 s and counts what comes beyond. After 30 s one campaign is
killed; the two others go on until each has its samples. Printed are the calls of each campaign in each minute.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.mock import Mock

NAMES = ("killed", "b", "c")
KILL_AFTER_S = 30.0
SPEC = """
name = "{name}"
target = {target}
domains = {{ echo = 1.0 }}

[lanes.flash]
provider = "gemini"
model = "m"
base_url = "{url}"
rpm = {rpm}
"""
HAFS = [sys.executable, "-m", "tests.fakes.echo_domain"]


def start(home: Path, name: str, target: int, url: str, rpm: int) -> subprocess.Popen[bytes]:
    spec = home / f"{name}.toml"
    spec.write_text(SPEC.format(name=name, target=target, url=url, rpm=rpm))
    environment = {**os.environ, "HAFS_HOME": str(home), "GEMINI_API_KEY": "one-key-for-all"}
    command = [*HAFS, "campaign", "start", str(spec)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def minutes(home: Path, name: str, began: float) -> Counter[int]:
    """Calls that ended in each minute since the first one began."""
    lines = (home / "training" / name / "calls.jsonl").read_bytes().split(b"\n")[:-1]
    return Counter(int((json.loads(line)["time"] - began) // 60) for line in lines)


def main(rpm: int = 120) -> None:
    with Mock(LAT=0.4, RPM=rpm) as mock, tempfile.TemporaryDirectory() as folder:
        home, began = Path(folder), time.time()
        children = [start(home, name, rpm + 10, mock.url, rpm) for name in NAMES]
        time.sleep(KILL_AFTER_S)
        children[0].kill()
        codes = [child.wait() for child in children]
        seen = mock.get("/stats")
        for name in NAMES:
            calls = minutes(home, name, began)
            each = [str(calls[minute]) for minute in range(max(calls, default=0) + 1)]
            print(f"{name:7} calls in each minute: {', '.join(each)}")
        print(f"rpm {rpm}: {seen['n']} requests in {seen['span_s']} s, over the limit {seen.get('over_rpm', 0)}, codes {codes}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]))
