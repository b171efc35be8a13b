"""The one process that moves jobs on: it starts a runner for one job a device and follows it through the job's folder.

Whose turn it is: the highest priority, in it the oldest job, that waits for no other one. A runner outlives the daemon. A daemon
that starts finds what its predecessor left and follows it on; nothing is started twice. An attempt is over, and its lease free,
only when no process of it is left. A heartbeat that stays away is told, and kills nothing. A cut-off attempt (killed, rebooted)
is queued again, and so is one that met what may pass (TRY_AGAIN); any other that said why it failed has failed. The daemon leaves
when idle only if nothing is owed. It never loads torch.

It looks around five times a second: files in a job's folder and rows from other processes have no event that all systems share.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from config.contracts.job import JobError, JobState, JobView
from config.errors import HafsError, JobCancelled, JobFailed, StoreHeld, translate_os_errors
from config.faults import around
from config.locks import FileLock, holder
from trainer_node.jobdir import TRY_AGAIN, Exit, JobDir, RunnerRecord, clear_orphans
from trainer_node.leases import device_lock, devices
from trainer_node.processes import Child, Processes, ProcessId, describe_exit
from trainer_node.queue import Queue
from trainer_node.runner import PIPELINE, log_tail, runner_argv
from trainer_node.train.checkpoints import newest_complete, step_of

log = logging.getLogger("trainer_node.daemon")


@dataclass(frozen=True)
class Pace:
    """Seconds. `grace_s`: from the stop file to the kill; `start_s`: until a runner must have said who it is; `silence_s`:
    without a heartbeat until that is worth a line in the log.
    """

    tick_s: float = 0.2
    grace_s: float = 20.0
    backoff_s: float = 5.0
    start_s: float = 30.0
    silence_s: float = 60.0


def lock_file(root: Path) -> Path:
    return root / "daemon.lock"


def log_file(root: Path) -> Path:
    return root / "daemon.log"


def daemon_pid(root: Path) -> int | None:
    """The pid of the daemon that serves this root; None if there is none, 0 if it is just starting."""
    return holder(lock_file(root))


class Daemon:
    """`idle_exit_s` None: stay for ever. `clock` counts seconds from any moment."""

    def __init__(
        self,
        root: Path,
        *,
        idle_exit_s: float | None = None,
        pipeline: Sequence[str] = PIPELINE,
        pace: Pace = Pace(),
        processes: Processes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self._idle_exit_s, self._pipeline, self._pace = idle_exit_s, pipeline, pace
        self._processes, self._clock = processes or Processes(), clock
        self._devices = devices()
        self._stop = threading.Event()
        self._stopped_by = 0
        self._lock = FileLock(lock_file(root))
        self._runners: dict[str, Child] = {}  # job → the runner that this daemon started for it last
        self._since: dict[tuple[str, int, str], float] = {}  # (job, attempt, what) → when this daemon first saw it

    def serve(self) -> None:
        """Work until SIGTERM, SIGINT, or idle for long enough.

        Raises:
            StoreHeld: another daemon serves this root.
            KeyboardInterrupt: SIGINT ended it.
        """
        self._take_lock()
        _log_to(log_file(self.root))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        queue = Queue(self.root)
        self._clear_orphans(queue)
        log.info("serving %s; adopted: %s", self.root, [job.id for job in queue.owed() if job.state.active] or "nothing")
        try:
            self._work(queue)
        except Exception:
            log.exception("the daemon ends with an error")
            raise
        finally:
            queue.close()
            self._lock.release()
        log.info("leaving; a running job goes on")
        if self._stopped_by == signal.SIGINT:
            raise KeyboardInterrupt

    def step(self, queue: Queue) -> bool:
        """One look around. Whether anything is owed."""
        owed, cancels = queue.owed(), queue.cancels()
        if any(job.state is JobState.INTERRUPTED for job in owed):
            queue.requeue_due(time.time())
            owed = queue.owed()
        for job in owed:
            if job.state.active:
                self._follow(queue, job, cancelled=job.id in cancels)
            elif job.id in cancels:
                log.info("%s cancelled before it ran", job.id)
                queue.end(job.id, JobState.CANCELLED)
        waiting = [job for job in owed if job.state is JobState.QUEUED and job.id not in cancels]
        self._start_some(queue, [job for job in waiting if self._turn_has_come(queue, job)])
        return bool(owed)

    def _work(self, queue: Queue) -> None:
        idle_since = time.monotonic()
        trouble = ""
        while not self._stop.is_set():
            try:
                if self.step(queue):
                    idle_since = time.monotonic()
                trouble = ""
            except HafsError as error:  # a full disk, a process that does not die: tried again, said once
                if str(error) != trouble:
                    log.error("%s; trying again", error)
                trouble = str(error)
                idle_since = time.monotonic()
            idle = time.monotonic() - idle_since
            if self._idle_exit_s is not None and idle >= self._idle_exit_s and self._may_leave(queue):
                log.info("idle for %.0f s", idle)
                return
            self._stop.wait(self._pace.tick_s)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._stopped_by = number
        self._stop.set()

    def _take_lock(self) -> None:
        if not self._acquire():
            who = holder(self._lock.path)
            known = f" (pid {who})" if who else ""
            raise StoreHeld(f"a daemon serves {self.root} already{known}", hint="there is nothing to do")

    def _clear_orphans(self, queue: Queue) -> None:
        try:
            for orphan in clear_orphans(self.root, queue):
                log.info("removed %s: its submit ended before it was queued", orphan)
        except HafsError as error:  # worth a word, and no reason to train nothing
            log.error("%s", error)

    def _may_leave(self, queue: Queue) -> bool:
        """Free the lock, then look once more: a job that came before is seen here, one that comes later finds no daemon."""
        self._lock.release()
        return not queue.owed() or not self._acquire()  # not acquired: a new daemon is there already

    def _acquire(self) -> bool:
        taken = self._lock.acquire(1.0)
        if taken:
            self._lock.sign()
        return taken

    def _turn_has_come(self, queue: Queue, job: JobView) -> bool:
        """Whether the job waits for no other one; it ends with the one it waits for, unless that one succeeds."""
        if not job.after:
            return True
        first = queue.get(job.after)
        if first.state is JobState.FAILED:
            hint = f"hafs train retry {first.id}, and then {job.id}"
            error = JobError(code=JobFailed.__name__, message=f"{first.id} failed, and this job goes on from it", hint=hint)
            queue.end(job.id, JobState.FAILED, error=error)
        elif first.state is JobState.CANCELLED:
            told = f"{first.id} was cancelled, and this job goes on from it"
            queue.end(job.id, JobState.CANCELLED, error=JobError(code=JobCancelled.__name__, message=told))
        return first.state is JobState.SUCCEEDED

    def _start_some(self, queue: Queue, waiting: Sequence[JobView]) -> None:
        """Start the first ones, one a free device."""
        if not waiting:
            return
        leased = {lease.device for lease in queue.leases()}
        if not leased:
            self._devices = devices()  # a driver may have come since the machine started, or a card have gone
        if leased - set(self._devices):
            return  # on a device that was renamed or went: nobody knows what it still uses
        free = [device for device in self._devices if device not in leased]
        for job, device in zip(waiting, free, strict=False):
            pid = holder(device_lock(self.root, device))
            if pid is None:
                self._start(queue, job, device)
            else:
                queue.advance(job.id, JobState.QUEUED, f"waits for {device}: what process {pid} started still holds it")

    def _start(self, queue: Queue, job: JobView, device: str) -> None:
        attempt = queue.begin_attempt(job.id, device)
        lease = queue.lease(job.id)
        folder = JobDir(self._folder(job).path, lease.fence if lease else 0)
        with translate_os_errors(folder.path):
            folder.attempt(attempt).mkdir(parents=True, exist_ok=True)
            with around("stop.remove"):
                folder.stop_file.unlink(missing_ok=True)
        argv = runner_argv(folder, attempt, device, self._pipeline)
        with around("runner.start"):
            runner = self._processes.start_detached(argv, cwd=folder.path, log=log_file(self.root))
        self._runners[job.id] = runner
        log.info("%s attempt %d on %s: runner %d", job.id, attempt, device, runner.pid)

    def _follow(self, queue: Queue, job: JobView, *, cancelled: bool) -> None:
        folder = self._folder(job)
        record = folder.runner(job.attempt)
        if record is None:
            self._await_runner(queue, job)
            return
        if job.id in self._runners:
            self._runners[job.id].poll()  # reaps it
        runner = ProcessId(record.pid, record.create_time, record.boot_id)
        # Life first, exit.json second: a dead runner without one will never write it.
        living = self._processes.alive(runner)
        exit_ = folder.exit(job.attempt)
        stage = folder.stage(job.attempt)
        if stage is not None and (stage.state, stage.detail) != (job.state, job.detail):
            queue.advance(job.id, stage.state, stage.detail)
        if exit_ is None and living:
            self._tell_silence(job, record)
            if cancelled:
                self._press(job, folder, runner)
            return
        with around("tree.kill"):
            self._processes.kill_tree(runner)
        self._runners.pop(job.id, None)
        self._finish(queue, job, exit_, cancelled=cancelled)

    def _tell_silence(self, job: JobView, record: RunnerRecord) -> None:
        """Once an attempt. A machine that slept, a disk that stalls, a debugger: a living process is never killed for that."""
        silent = (job.id, job.attempt, "silence")
        if 0 < record.heartbeat_at < time.time() - self._pace.silence_s and silent not in self._since:
            self._since[silent] = self._clock()
            log.warning("%s: no heartbeat of runner %d for %.0f s; it lives", job.id, record.pid, self._pace.silence_s)

    def _await_runner(self, queue: Queue, job: JobView) -> None:
        """A runner that was just started has not said who it is. runner.lock keeps a late one from meeting the next."""
        ours = self._runners.get(job.id)
        if (ours is not None and ours.poll() is not None) or self._seconds_since(job, "start") > self._pace.start_s:
            self._interrupt(queue, job, "its runner did not start")

    def _press(self, job: JobView, folder: JobDir, runner: ProcessId) -> None:
        """The stop file, and after the grace the kill."""
        if not folder.stop_file.exists():
            log.info("%s: stop file", job.id)
            with translate_os_errors(folder.stop_file), around("stop.write"):
                folder.stop_file.touch()
        if self._seconds_since(job, "stop") > self._pace.grace_s:
            log.info("%s: killing what is left after %.0f s", job.id, self._pace.grace_s)
            with around("tree.kill_deaf"):
                self._processes.kill_tree(runner)

    def _finish(self, queue: Queue, job: JobView, exit_: Exit | None, *, cancelled: bool) -> None:
        """No process of the attempt is left. A result that is there counts, even where a cancel came too late."""
        folder = self._folder(job)
        if exit_ is not None and exit_.code == 0:
            queue.end(job.id, JobState.SUCCEEDED, result=folder.result())
        elif cancelled:
            queue.end(job.id, JobState.CANCELLED)
        elif exit_ is None:
            self._interrupt(queue, job, "its runner was cut off")
            return
        elif exit_.error is not None and exit_.code == TRY_AGAIN:
            self._interrupt(queue, job, exit_.error.message, exit_.error)
            return
        elif exit_.error is not None:
            queue.end(job.id, JobState.FAILED, error=exit_.error)
        else:
            how = "was stopped" if exit_.stopped else describe_exit(exit_.code)
            self._interrupt(queue, job, f"the pipeline {how}")
            return
        log.info("%s attempt %d: %s", job.id, job.attempt, queue.get(job.id).state)

    def _interrupt(self, queue: Queue, job: JobView, why: str, error: JobError | None = None) -> None:
        folder = self._folder(job)
        checkpoint, tail = step_of(newest_complete(folder.checkpoints)), log_tail(folder, job.attempt)
        state = queue.interrupt(job.id, checkpoint=checkpoint, why=why, tail=tail, error=error, backoff_s=self._pace.backoff_s)
        log.info("%s attempt %d, checkpoint %d: %s: %s", job.id, job.attempt, checkpoint, state, why)

    def _seconds_since(self, job: JobView, what: str) -> float:
        now = self._clock()
        return now - self._since.setdefault((job.id, job.attempt, what), now)

    def _folder(self, job: JobView) -> JobDir:
        return JobDir(self.root / "jobs" / job.id)


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    form = logging.Formatter("%(asctime)sZ %(levelname)s daemon[%(process)d] %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handler.setFormatter(form)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
