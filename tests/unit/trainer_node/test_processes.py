import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from config.errors import StoreError
from tests.fakes.waiting import wait_for
from trainer_node.processes import (
    ProcessId,
    alive,
    describe_exit,
    identify,
    identify_self,
    kill_tree,
    start_detached,
    tree,
)

# A session leader with one child, which says its pid and waits; the child of the second form leaves the session.
LEADER = """
import subprocess, sys, signal
child = subprocess.Popen([sys.executable, "-c", "import signal\\nwhile True: signal.pause()"], start_new_session={leaves})
print(child.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def start() -> Iterator[Callable[[bool], tuple["subprocess.Popen[str]", ProcessId, ProcessId]]]:
    leaders: list[subprocess.Popen[str]] = []
    pids: list[int] = []

    def _start(leaves: bool) -> tuple["subprocess.Popen[str]", ProcessId, ProcessId]:
        argv = [sys.executable, "-c", LEADER.format(leaves=leaves)]
        leader = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
        leaders.append(leader)
        assert leader.stdout is not None
        pids.append(int(leader.stdout.readline()))
        head, child = identify(leader.pid), identify(pids[-1])
        assert head is not None and child is not None
        return leader, head, child

    yield _start
    for leader in leaders:
        leader.kill()
        leader.wait()
        assert leader.stdout is not None
        leader.stdout.close()
    for pid in pids:
        if identify(pid) is not None:
            os.kill(pid, signal.SIGKILL)


def test_a_process_is_itself_and_no_other() -> None:
    me = identify_self()
    assert alive(me)
    assert not alive(replace(me, create_time=me.create_time - 1)), "a reused pid is another process"
    assert not alive(replace(me, boot_id="another boot"))


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = identify(child.pid)
    assert process is not None and alive(process)
    child.kill()
    wait_for("end of the process", lambda: not alive(process))
    assert identify(child.pid) is None, "not reaped yet, but dead"
    child.communicate()


def test_the_whole_tree_dies(start: Callable[..., tuple["subprocess.Popen[str]", ProcessId, ProcessId]]) -> None:
    _, head, child = start(False)
    assert {process.pid for process in tree(head)} == {head.pid, child.pid}
    kill_tree(head)
    assert not alive(head) and not alive(child)


def test_an_orphan_is_found_after_its_leader_died(
    start: Callable[..., tuple["subprocess.Popen[str]", ProcessId, ProcessId]],
) -> None:
    leader, head, child = start(False)
    leader.kill()
    leader.wait()
    assert tree(head) == [child]
    kill_tree(head)
    assert not alive(child)


def test_what_has_its_own_session_is_spared(start: Callable[..., tuple["subprocess.Popen[str]", ProcessId, ProcessId]]) -> None:
    _, head, child = start(True)
    kill_tree(head)
    assert not alive(head)
    assert alive(child)


def test_a_pid_that_became_someone_elses_is_never_killed(
    start: Callable[..., tuple["subprocess.Popen[str]", ProcessId, ProcessId]],
) -> None:
    _, head, child = start(False)
    kill_tree(replace(head, create_time=head.create_time - 5))
    kill_tree(replace(head, boot_id="before the reboot"))
    assert alive(head) and alive(child)


def test_a_detached_process_leads_its_own_session_and_writes_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.txt"
    child = start_detached(
        [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid(), os.getcwd())"], cwd=tmp_path, log=log
    )
    assert child.wait(20) == 0
    first, *said = log.read_text().splitlines()
    assert first.startswith("--- ") and sys.executable in first
    assert said == [f"True {tmp_path}"]


def test_a_program_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nonesuch"):
        start_detached([str(tmp_path / "nonesuch")], cwd=tmp_path, log=tmp_path / "log")


@pytest.mark.parametrize(
    ("code", "words"), [(-9, "was killed by SIGKILL"), (3, "ended with exit code 3"), (-250, "was killed by signal 250")]
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
