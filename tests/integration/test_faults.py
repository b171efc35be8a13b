"""kill -9 at each fault point of daemon, runner and rpc, before and after: the job is there once and ends once.

CI runs a seeded tenth, three kills a run; HAFS_FAULTS=all runs each point five times, alone.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard

from config.contracts import wire
from config.contracts.base import canonical_json
from config.contracts.job import JobSpec, JobView, TrainJob
from config.contracts.manifest import DatasetManifest, Segment
from config.faults import VARIABLE
from config.locks import holder
from tests.fakes.fault_points import MODULES, ROOT, fault_points
from tests.fakes.leftovers import end_nodes
from tests.fakes.node_dataset import put_dataset
from trainer_node.jobdir import JobDir
from trainer_node.processes import ProcessId, alive
from trainer_node.queue import Queue
from trainer_node.refusals import MAX_BYTES

pytestmark = [pytest.mark.integration, pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")]

ALL = os.environ.get("HAFS_FAULTS") == "all"
RPC = Path(__file__).parents[1] / "fakes" / "rpc.py"
TIMES = 5
SIDES = ("before", "after")
INBOX = "trainer_node/inbox.py"  # receives data, not jobs
POINTS = [f"{name}.{side}" for name in sorted(fault_points(tuple(set(MODULES) - {INBOX}))) for side in SIDES]
ARRIVAL = [f"{name}.{side}" for name in fault_points((INBOX,)) for side in SIDES]
RECEIVE = """
import io, sys
from pathlib import Path
from config.contracts.manifest import DatasetManifest
from trainer_node.inbox import Inbox
root, inbox = Path(sys.argv[1]), Inbox(Path(sys.argv[1]))
manifest = DatasetManifest.model_validate_json((root / "sent" / "manifest.json").read_bytes())
for segment in manifest.segments:
    status = inbox.have(segment)
    if not status.present:
        packed = (root / "sent" / segment.sha256).read_bytes()
        inbox.receive(segment, status.offset, io.BytesIO(packed[status.offset:]))
        inbox.settle()
print(inbox.commit_dataset(manifest).id)
inbox.close()
"""
DEADLINE_S = 60.0
SCRIPT = [
    "pin hf:owner/repo@1f/base.gguf",
    "stage RUNNING",
    "grow",
    "once waits await nothing",  # until the runner is told to end
    "grow",
    "once deaf stubborn",  # until it is cancelled
    "stage EVALUATING",
    "grow",
    "succeed",
]


class Laptop:
    """One open session with an rpc process; asks again, over another one, when there is no answer."""

    def __init__(self, root: Path, faults: str) -> None:
        self._argv = [sys.executable, "-P", str(RPC), str(root)]
        self._env = {**os.environ, VARIABLE: faults}
        self._log = (root.parent / "rpc.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, verb: str, args: dict[str, Any]) -> dict[str, Any]:
        reply = self._ask(verb, args)
        assert reply.result is not None, reply.error
        return reply.result

    def ask_nonsense(self) -> None:
        """It is refused, and that is noted in a log that is due to move aside."""
        assert self._ask("nonsense", {}).error is not None

    def _ask(self, verb: str, args: dict[str, Any]) -> wire.Reply:
        line = canonical_json({"verb": verb, "args": args}) + b"\n"
        for _ in range(20):
            if answer := self._exchange(line):
                return wire.Reply.model_validate_json(answer)
        raise AssertionError(f"no answer to {verb}")

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._process = None

    def hang_up(self) -> None:
        self.close()
        self._log.close()

    def _exchange(self, line: bytes) -> bytes:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._argv, stdin=pipe, stdout=pipe, stderr=self._log, env=self._env)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            self._process.kill()
            self.close()
        return answer


class Run:
    """One job from its submit to its end, through a SIGTERM of its runner, a cancel of a deaf pipeline, and a retry."""

    def __init__(self, folder: Path, faults: list[tuple[str, int]]) -> None:
        self.folder, self.root = folder, folder / "node"
        dataset_id = put_dataset(self.root, b'{"id": "a"}\n')
        (self.root / "rpc.log").write_bytes(b"x" * (MAX_BYTES + 1))
        orphan = self.root / "jobs" / "sft-0009-dead"
        orphan.mkdir(parents=True)
        (orphan / "job.json").touch()
        os.utime(orphan, (0, 0))
        text = " ".join(f"{point}@{nth}@{folder / point}" for point, nth in faults)
        self.laptop = Laptop(self.root, text)
        spec = JobSpec(kind="sft", name="coder", base="x", data=["d"], system=json.dumps({"*": SCRIPT}))
        self.job = TrainJob(spec=spec, dataset_id=dataset_id, code_version="0", nonce="1")
        self.told: set[str] = set()
        self.retried = 0

    def go(self) -> JobView:
        try:
            self.laptop.ask_nonsense()
            for _ in range(2):
                submitted = self.laptop.ask("submit", wire.SubmitArgs(job=self.job).model_dump(mode="json"))
            id_ = submitted["job"]["id"]
            end = time.monotonic() + DEADLINE_S
            while not (view := self.look(id_)).state.ended:
                assert time.monotonic() < end, f"{view}\n{(self.root / 'daemon.log').read_text()}"
                self.act(view, JobDir(self.root / "jobs" / id_))
                time.sleep(0.02)
            stalled = view.error is not None and "no new checkpoint" in view.error.message  # two kills in a row
            if view.state == "CANCELLED" or stalled:
                self.laptop.ask("retry", {"job": id_})
                self.retried += 1
                return self.go()
            self.check(view)
            return view
        finally:
            self.laptop.close()

    def look(self, id_: str) -> JobView:
        """Also brings a daemon back that was killed."""
        [view] = self.laptop.ask("status", {"job": id_})["jobs"]
        return JobView.model_validate(view)

    def act(self, view: JobView, folder: JobDir) -> None:
        record = folder.runner(view.attempt)
        if (folder.path / "waits").exists() and "waits" not in self.told and record is not None:
            self.told.add("waits")
            if alive(ProcessId(record.pid, record.create_time, record.boot_id)):
                os.kill(record.pid, signal.SIGTERM)
        elif (folder.path / "child.pid").exists() and "deaf" not in self.told:
            self.told.add("deaf")
            self.laptop.ask("cancel", {"job": view.id})

    def check(self, view: JobView) -> None:
        assert view.state == "SUCCEEDED", view
        folder = JobDir(self.root / "jobs" / view.id)
        queue = Queue(self.root)
        assert [job.id for job in queue.all()] == [view.id] and queue.leases() == []
        states = [event.state for event in queue.events(view.id)]
        queue.close()
        assert all(old is new or old.may_become(new) or (old.ended and new == "QUEUED") for old, new in pairwise(states))
        assert sum(state.ended for state in states) == self.retried + 1, "one end, and one for each retry"
        steps = [int(line) for line in (folder.path / "steps.txt").read_text().split()]
        assert steps == sorted(set(steps)) and len(steps) >= 3, "no step is taken twice"
        assert not (folder.path / "overlap").exists(), "two were at work at once"
        assert [path.name for path in (self.root / "jobs").iterdir()] == [view.id], "no orphan is left"
        assert folder.base() == "hf:owner/repo@1f/base.gguf"
        assert holder(self.root / "leases" / "cpu.lock") is None, "no process of it is left"


def killed(folder: Path, faults: list[tuple[str, int]]) -> bool:
    """Whether a run was killed at one of the points; another run is tried, as the daemon may be faster than a point."""
    return any(play(folder / str(again), faults) for again in range(3))


def play(folder: Path, faults: list[tuple[str, int]]) -> list[str]:
    """Play it through; which points killed. A wrong end is told with them."""
    run = Run(folder, faults)
    try:
        run.go()
    except BaseException as error:
        error.add_note(f"with {faults} in {folder}")
        raise
    finally:
        run.laptop.hang_up()
        end_nodes(folder)
    return [point for point, nth in faults if (folder / f"{point}.{nth}").exists()]


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often a run without a kill comes to each point."""
    folder = tmp_path_factory.mktemp("quiet")
    play(folder, [(point, 10**6) for point in POINTS])
    return {point: sum(1 for _ in folder.glob(f"{point}.*")) for point in POINTS}


def plan(reached: dict[str, int]) -> list[list[tuple[str, int]]]:
    chance = random.Random(7)
    faults = [(point, chance.randint(1, min(TIMES, reached[point]))) for point in POINTS for _ in range(TIMES)]
    chance.shuffle(faults)
    if ALL:
        return [[fault] for fault in faults]
    tenth = faults[: len(faults) // 10]
    return [tenth[number : number + 3] for number in range(0, len(tenth), 3)]


def test_every_point_is_on_the_way_of_a_job(reached: dict[str, int]) -> None:
    assert [point for point, times in reached.items() if not times] == []


@pytest.mark.timeout(3600 if ALL else 240)
def test_a_kill_at_any_point_loses_and_doubles_nothing(reached: dict[str, int], tmp_path: Path) -> None:
    runs = plan(reached)
    with ThreadPoolExecutor(2) as pool:
        hits = list(pool.map(lambda number: killed(tmp_path / str(number), runs[number]), range(len(runs))))
    missed = [faults for faults, hit in zip(runs, hits, strict=True) if not hit]
    assert missed == [], "a run in which nothing was killed shows nothing"


def send(root: Path, segments: int) -> DatasetManifest:
    """What a laptop would upload, in <root>/sent."""
    (root / "sent").mkdir(parents=True)
    described = []
    for number in range(segments):
        lines = f'{{"id": "{number}"}}\n'.encode() * 50
        packed = zstandard.compress(lines)
        sha256 = hashlib.sha256(packed).hexdigest()
        (root / "sent" / sha256).write_bytes(packed)
        described.append(Segment(sha256=sha256, rows=50, bytes=len(lines), packed_bytes=len(packed)))
    manifest = DatasetManifest(name="d", campaigns=["d"], segments=described)
    (root / "sent" / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


@pytest.mark.parametrize("point", ARRIVAL)
def test_a_kill_while_data_arrives_shows_nothing_unverified(tmp_path: Path, point: str) -> None:
    times = TIMES if ALL and not point.startswith("dataset") else 1
    for nth in range(1, times + 1):
        root = tmp_path / str(nth)
        manifest = send(root, times)
        argv = [sys.executable, "-P", "-c", RECEIVE, str(root)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: f"{point}@{nth}@{root / 'latch'}"}
        first = subprocess.run(argv, env=env, capture_output=True, check=False)
        assert first.returncode == -signal.SIGKILL, first
        for file in (root / "segments").glob("*"):
            assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name.split(".")[0]
        second = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        assert second.stdout.strip() == manifest.id
        assert len(list((root / "segments").glob("*"))) == times and len(list((root / "datasets").glob("*.json"))) == 1
