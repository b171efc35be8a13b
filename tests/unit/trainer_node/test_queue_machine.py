"""Whatever happens in whatever order: one job a key, at most one runner with a lease a device, one end a run of a job."""

import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from config import faults
from config.contracts.job import JobSpec, JobState, JobView, TrainJob
from tests.fakes.fake_processes import FakeProcesses, FakeRunner
from trainer_node.daemon import Daemon, Pace
from trainer_node.jobdir import JobDir
from trainer_node.queue import Queue
from trainer_node.train.checkpoints import newest_complete, step_of

PACE = Pace(backoff_s=0, grace_s=20, start_s=30)
LEGAL_AFTER_END = {JobState.QUEUED}
CRASH = st.one_of(st.just(0), st.integers(1, 12))  # at which fault point on the way; 0: none
DEEDS = ("success", "failure", "passing", "stopped", "die", "save", "tear", "1", "3")
SHM = Path("/dev/shm")


class Crash(BaseException):
    """kill -9 at a fault point: nothing but what is on the disk goes on."""


class NodeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(faults, "_ARMED", [faults.Fault("", 0, "")])
        self.patch.setattr(faults, "_reach", self._reach)
        self.crash_in = 0  # points until the crash; 0: none is due
        self.now = 0.0
        self.machine = FakeProcesses()
        self.keys: dict[str, str] = {}
        self.retries: dict[str, int] = {}
        self.steps: dict[str, int] = {}  # the newest whole checkpoint ever seen of a job

    @initialize(gpus=st.sampled_from(["", "0,1"]))
    def begin(self, gpus: str) -> None:
        self.patch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        self.restart()
        for priority in (0, 1, 0):
            self.submit(priority, -1, 0)

    def restart(self) -> None:
        """Another daemon, another connection."""
        if hasattr(self, "queue"):
            self.queue.close()
        self.queue = Queue(self.root)
        self.daemon = Daemon(self.root, pace=PACE, processes=self.machine, clock=lambda: self.now)

    def teardown(self) -> None:
        try:
            if hasattr(self, "queue"):
                self.finish()
                self.queue.close()
        finally:
            for runner in self.machine.living():
                runner.die()
            self.patch.undo()
            shutil.rmtree(self.root)

    # what people do

    @rule(priority=st.integers(-1, 1), after=st.integers(-60, 30), crash=CRASH)
    def submit(self, priority: int, after: int, crash: int) -> None:
        ids = sorted(self.keys.values())
        spec = JobSpec(kind="sft", name="coder", base="x", data=["d"])
        job = TrainJob(spec=spec, dataset_id="a" * 64, code_version="0", nonce=str(len(self.keys)), priority=priority)
        if ids and after >= 0:
            job = job.model_copy(update={"after": ids[after % len(ids)]})
        self.send(job, crash)
        self.send(job, 0)  # the laptop did not hear the answer, or did: it may ask again
        self.retries.setdefault(self.keys[job.key], 0)

    def send(self, job: TrainJob, crash: int) -> None:
        def ask() -> None:
            view, _ = self.queue.submit(job, lambda id_, job: JobDir(self.root / "jobs" / id_).write_job(job))
            assert self.keys.setdefault(job.key, view.id) == view.id

        self.crashing(crash, ask)

    @rule(number=st.integers(0, 99), again=st.booleans(), crash=CRASH)
    def cancel_or_retry(self, number: int, again: bool, crash: int) -> None:
        id_ = sorted(self.keys.values())[number % len(self.keys)]
        before = self.queue.get(id_).state
        self.crashing(crash, lambda: self.queue.retry(id_) and None if again else self.queue.intend_cancel(id_))
        assert before is not JobState.SUCCEEDED or self.queue.get(id_).state is before
        self.retries[id_] += before.ended and self.queue.get(id_).state is JobState.QUEUED

    # what the node does

    @rule(crash=CRASH, slow=st.booleans())
    def step(self, crash: int, slow: bool) -> None:
        before = {job.id: job for job in self.queue.all()}
        cancels, working = self.queue.cancels(), [r for r in self.at_work() if r.folder.exit(r.attempt) is None]
        self.crashing(crash, lambda: self.daemon.step(self.queue) and None)
        after = {job.id: job for job in self.queue.all()}
        begun = [id_ for id_ in after if after[id_].attempt > before[id_].attempt]
        for id_, job in after.items():
            waited = job.state is JobState.QUEUED and before[id_].state is JobState.QUEUED and id_ not in cancels
            if waited and (not job.after or before[job.after].state is JobState.SUCCEEDED):
                for other in begun:
                    assert rank(after[other]) < rank(job), f"{other} began before {id_}"
        killed = [runner.folder.id for runner in working if runner.code is not None]
        assert set(killed) <= cancels, "a living runner was killed for nothing"
        for runner in self.machine.living():
            if not slow and not runner.begun:
                runner.begin()

    @rule(time=st.sampled_from([0, 40]), reboot=st.sampled_from([False, False, False, True]))
    def the_daemon_restarts(self, time: int, reboot: bool) -> None:
        """Or hours pass without one."""
        self.now += time
        if reboot:
            self.machine.reboot()
        if reboot or not time:
            self.restart()

    @precondition(lambda self: self.machine.living())
    @rule(number=st.integers(0, 9), what=st.sampled_from(DEEDS))
    def a_runner_does(self, number: int, what: str) -> None:
        runner = self.machine.living()[number % len(self.machine.living())]
        saved = [step_of(path) for path in runner.folder.checkpoints.glob("checkpoint-*")]
        if not runner.begun:
            runner.begin()
        elif what in ("save", "tear"):
            runner.checkpoint(max(saved, default=0) + 1, whole=what == "save")
        elif what.isdecimal():
            runner.stage(int(what))
        elif what == "die":
            runner.die()
        else:
            runner.end(what)

    # what holds always

    @invariant()
    def a_job_at_work_has_one_lease_and_no_other_has_one(self) -> None:
        if not hasattr(self, "queue"):
            return
        leases = self.queue.leases()
        assert len({lease.device for lease in leases}) == len(leases)
        active = sorted(job.id for job in self.queue.all() if job.state.active)
        assert sorted(lease.job for lease in leases) == active

    @invariant()
    def whoever_works_holds_the_lease(self) -> None:
        """So a device has one at most, what was given up starts nothing, and what has ended is dead."""
        for runner in self.at_work():
            lease = self.queue.lease(runner.folder.id)
            assert lease is not None and (lease.device, lease.fence) == (runner.device, runner.folder.fence)

    @invariant()
    def a_run_of_a_job_ends_once(self) -> None:
        for id_ in self.keys.values():
            states = [event.state for event in self.queue.events(id_)]
            assert states[0] is JobState.QUEUED
            for old, new in pairwise(states):
                assert old is new or old.may_become(new) or (old.ended and new in LEGAL_AFTER_END)
            again = sum(old.ended for old, _ in pairwise(states))
            assert again == self.retries.get(id_, 0)
            assert JobState.SUCCEEDED not in states[:-1]

    @invariant()
    def whole_checkpoints_only_grow(self) -> None:
        for id_ in self.keys.values():
            step = step_of(newest_complete(self.root / "jobs" / id_ / "checkpoints"))
            assert step >= self.steps.get(id_, 0)
            self.steps[id_] = step

    def finish(self) -> None:
        """Nothing bad happens any more: everything ends, in one state."""
        for _ in range(40 * (1 + len(self.keys))):
            if not self.daemon.step(self.queue):
                break
            for runner in self.machine.living():
                runner.end("success") if runner.begun else runner.begin()
            self.now += 40
        jobs = self.queue.all()
        assert len(jobs) == len(self.keys) and all(job.state.ended for job in jobs), jobs
        assert self.queue.leases() == [] and self.queue.cancels() == set()

    def crashing(self, points: int, work: Callable[[], None]) -> None:
        """Do it, with a crash at the `points`-th fault point on the way; 0: without."""
        self.crash_in = points
        try:
            work()
        except Crash:
            self.restart()
        finally:
            self.crash_in = 0

    def _reach(self, _: str) -> None:
        self.crash_in -= 1
        if self.crash_in == 0:
            raise Crash

    def at_work(self) -> list[FakeRunner]:
        return [runner for runner in self.machine.living() if runner.begun]


def rank(job: JobView) -> tuple[int, str]:
    return -job.priority, job.id


TestNode = NodeMachine.TestCase
TestNode.settings = settings(
    max_examples=int(os.environ.get("HAFS_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
