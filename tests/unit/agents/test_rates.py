import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import rates as rates_module
from agents.rates import Participants, Rates
from config.errors import StoreError

WINDOW_S = 61.5
PACIFIC = ZoneInfo("America/Los_Angeles")


def pacific(*when: int) -> float:
    return datetime(*when, tzinfo=PACIFIC).timestamp()


class Wall:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@contextmanager
def child(script: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that runs a script, is killed at the end, and answers each line it is sent with a line."""
    process = subprocess.Popen([sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def go_on(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


# --- the window -------------------------------------------------------------------------------------------------------------


def test_no_limits_ask_for_nothing(tmp_path: Path) -> None:
    free = Rates(None, None, None, ledger=tmp_path / "rates")
    assert free.ready_at(5.0, 10**9) <= 5.0 and free.claim(5.0, 10**9)
    free.correct(5.0, 1, 2)
    assert not (tmp_path / "rates").exists()


def test_calls_a_minute_slide() -> None:
    limited = Rates(2, None, None)
    assert limited.claim(0.0, 1) and limited.claim(10.0, 1) and not limited.claim(10.0, 1)
    assert limited.ready_at(10.0, 1) == WINDOW_S
    assert not limited.claim(WINDOW_S - 0.01, 1)
    assert limited.claim(WINDOW_S, 1) and not limited.claim(WINDOW_S, 1)
    assert limited.ready_at(61.0, 1) == 10.0 + WINDOW_S


def test_a_first_burst_that_takes_a_second_to_arrive_does_not_meet_the_next_one_within_a_minute() -> None:
    limited, slow_s, fast_s = Rates(100, None, None), 1.2, 0.0
    assert all(limited.claim(0.0, 1) for _ in range(100))
    assert limited.ready_at(0.0, 1) + fast_s - slow_s > 60, "as the server sees it"


def test_tokens_a_minute_slide_and_too_many_never_fit() -> None:
    limited = Rates(None, 1000, None)
    assert limited.claim(0.0, 400) and limited.claim(20.0, 500) and not limited.claim(30.0, 101)
    assert limited.ready_at(30.0, 100) <= 30.0
    assert limited.ready_at(30.0, 101) == WINDOW_S
    assert limited.ready_at(30.0, 501) == 20.0 + WINDOW_S
    assert limited.ready_at(30.0, 1001) == math.inf and not limited.claim(200.0, 1001)


def test_the_true_count_frees_or_takes_what_the_estimate_did_not() -> None:
    limited = Rates(None, 1000, None)
    assert limited.claim(0.0, 900)
    limited.correct(1.0, 900, 300)
    assert limited.claim(2.0, 700) and not limited.claim(2.0, 1)
    limited.correct(3.0, 700, 800)
    assert limited.ready_at(4.0, 200) == WINDOW_S, "100 more than allowed now"
    assert limited.claim(WINDOW_S, 200) and not limited.claim(WINDOW_S, 1)
    limited.correct(130.0, 200, 900)
    assert limited.claim(130.0, 1000), "what has left the window is not corrected any more"


Step = tuple[float, int, bool]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60), st.booleans()), max_size=120), st.booleans())
def test_no_window_ever_holds_more(tmp_path_factory: pytest.TempPathFactory, steps: list[Step], shared: bool) -> None:
    """Against a plain account of what was started. Two users of a ledger count as one."""
    ledger = tmp_path_factory.mktemp("l") / "rates" if shared else None
    first = Rates(7, 150, None, ledger=ledger)
    users = [first, Rates(7, 150, None, ledger=ledger) if shared else first]
    window: deque[tuple[float, int]] = deque()
    now = 0.0
    for index, (passed, tokens, soon) in enumerate(steps):
        user = users[index % 2]
        ready = user.ready_at(now, tokens)
        now = ready if soon and now < ready < math.inf else now + passed
        while window and window[0][0] + WINDOW_S <= now:
            window.popleft()
        fits = len(window) < 7 and sum(count for _, count in window) + tokens <= 150
        assert user.claim(now, tokens) == fits
        if fits:
            window.append((now, tokens))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60), st.integers(0, 80)), max_size=80))
def test_corrected_counts_never_let_more_tokens_in_than_were_really_used(steps: list[tuple[float, int, int]]) -> None:
    limited, now = Rates(None, 200, None), 0.0
    used: list[tuple[float, int]] = []
    for passed, estimated, actual in steps:
        now += passed
        before = sum(count for when, count in used if when + WINDOW_S > now)
        if limited.claim(now, estimated):
            assert before + estimated <= 200
            limited.correct(now, estimated, actual)
            used.append((now, actual))


def test_a_clock_that_was_read_a_little_late_loses_nothing() -> None:
    limited = Rates(2, None, None)
    assert limited.claim(100.0, 1) and limited.claim(99.0, 1) and not limited.claim(99.5, 1)
    assert limited.ready_at(101.0, 1) == 100.0 + WINDOW_S


def test_stamps_from_before_a_reboot_are_void(tmp_path: Path) -> None:
    before = Rates(2, None, None, ledger=tmp_path / "rates")
    assert before.claim(5000.0, 1) and before.claim(5000.0, 1)
    after = Rates(2, None, None, ledger=tmp_path / "rates")
    assert after.ready_at(20.0, 1) <= 20.0
    assert after.claim(20.0, 1) and after.claim(20.0, 1) and not after.claim(20.0, 1)


@pytest.mark.parametrize("damage", [b"\xff" * 60, b"some other file" * 9, b"hafsrat1" + b"\1" * 40])
def test_a_damaged_ledger_is_closed_for_one_window(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "rates"
    used = Rates(5, None, None, ledger=path)
    assert used.claim(0.0, 1)
    with path.open("r+b") as file:
        file.write(damage)
    assert not used.claim(1.0, 1)
    assert used.ready_at(2.0, 1) == 1.0 + WINDOW_S and not used.claim(30.0, 1)
    assert used.claim(1.0 + WINDOW_S, 1)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Rates(1, None, None, ledger=tmp_path / "file" / "rates")


def test_more_calls_than_the_ring_holds_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "_CAPACITY", 8)
    limited = Rates(None, 10**9, None)
    assert [limited.claim(float(second), 1) for second in range(9)] == [True] * 8 + [False]
    assert limited.ready_at(9.0, 1) == WINDOW_S and limited.claim(WINDOW_S, 1)


# --- the day ----------------------------------------------------------------------------------------------------------------


def test_a_day_ends_at_midnight_in_california() -> None:
    wall = Wall(pacific(2026, 7, 1, 23, 0))
    limited = Rates(None, None, 2, wall=wall)
    assert limited.claim(1000.0, 1) and limited.claim(1000.0, 1) and not limited.claim(1000.0, 1)
    assert limited.ready_at(1000.0, 1) == pytest.approx(1000.0 + 3600)
    wall.now += 3599
    assert not limited.claim(4599.0, 1)
    wall.now += 1
    assert limited.claim(4600.0, 1)


def test_the_day_that_is_an_hour_longer_is_counted_so() -> None:
    limited = Rates(None, None, 1, wall=Wall(pacific(2026, 11, 1, 0, 0)))
    assert limited.claim(0.0, 1)
    assert limited.ready_at(0.0, 1) == pytest.approx(25 * 3600)


def test_time_passes_with_the_faster_clock() -> None:
    """A laptop's clock stands still while it sleeps; a wall clock can be set back; a simulated clock runs ahead."""
    wall = Wall(pacific(2026, 7, 1, 12, 0))
    limited = Rates(None, None, 1, wall=wall)
    assert limited.claim(0.0, 1)
    wall.now -= 2 * 86400
    assert not limited.claim(10.0, 1)
    wall.now = pacific(2026, 7, 2, 8, 0)
    assert limited.claim(20.0, 1)
    assert limited.claim(20.0 + 86400, 1)


def test_the_days_count_outlives_a_reboot_and_a_clock_that_was_set_back(tmp_path: Path) -> None:
    noon = pacific(2026, 7, 1, 12, 0)
    one = Rates(None, None, 2, ledger=tmp_path / "rates", wall=Wall(noon))
    assert one.claim(5000.0, 1)
    rebooted = Rates(None, None, 2, ledger=tmp_path / "rates", wall=Wall(noon + 60))
    assert rebooted.claim(10.0, 1) and not rebooted.claim(10.0, 1)
    yesterday = Rates(None, None, 2, ledger=tmp_path / "rates", wall=Wall(noon - 86400))
    assert not yesterday.claim(20.0, 1)
    years_ahead = Rates(None, None, 2, ledger=tmp_path / "rates", wall=Wall(pacific(2031, 1, 1)))
    assert years_ahead.claim(30.0, 1)
    assert Rates(None, None, 2, ledger=tmp_path / "rates", wall=Wall(noon)).claim(40.0, 1), "a count of years ahead is void"


@pytest.mark.parametrize(("rpm", "rpd"), [(None, None), (5, None), (None, 5)])
def test_what_the_server_calls_exhausted_is_so_for_all_until_midnight(tmp_path: Path, rpm: int | None, rpd: int | None) -> None:
    wall = Wall(pacific(2026, 7, 1, 20, 0))
    told = Rates(rpm, None, rpd, ledger=tmp_path / "rates", wall=wall)
    other = Rates(rpm, None, rpd, ledger=tmp_path / "rates", wall=wall)
    assert told.claim(0.0, 1)
    told.exhaust_day(1.0)
    assert not told.claim(2.0, 1) and told.ready_at(2.0, 1) == pytest.approx(4 * 3600, abs=3)
    assert other.claim(2.0, 1) == (rpm is None and rpd is None), "without a limit there is no ledger to tell it"
    wall.now += 4 * 3600
    assert told.claim(4 * 3600.0, 1)


# --- processes --------------------------------------------------------------------------------------------------------------

CLAIMS = """
import sys, time
from pathlib import Path
from agents.rates import Rates
rates = Rates({rpm}, 10**9, 10**6, ledger=Path({path!r}))
print("ready", flush=True)
sys.stdin.readline()
while rates.claim(time.monotonic(), 7):
    print("claimed", flush=True)
print("full", flush=True)
sys.stdin.readline()
"""


def test_processes_stay_under_the_limit_together(tmp_path: Path) -> None:
    script = CLAIMS.format(path=str(tmp_path / "rates"), rpm=500)
    with child(script) as one, child(script) as other:
        claims = [0, 0]
        for process in (one, other):
            assert line(process) == "ready"
        for process in (one, other):
            go_on(process)
        for index, process in enumerate((one, other)):
            while line(process) == "claimed":
                claims[index] += 1
    assert sum(claims) == 500
    left = Rates(500, 10**9, 10**6, ledger=tmp_path / "rates")
    assert not left.claim(time.monotonic(), 7)


def test_a_kill_neither_loses_a_claim_nor_holds_the_lock(tmp_path: Path) -> None:
    """Killed at some moment of its work, again and again: what it said it had claimed is counted."""
    rpm, said, kills = 5000, 0, 5  # so many that none of them reaches the limit before it is killed
    script = CLAIMS.format(path=str(tmp_path / "rates"), rpm=rpm)
    for _ in range(kills):
        with child(script) as process:
            assert line(process) == "ready"
            go_on(process)
            for _ in range(20):
                assert line(process) == "claimed"
            process.kill()
            rest = process.stdout.read() if process.stdout else b""
        said += 20 + rest.count(b"claimed\n")
        free = 0
    survivor = Rates(rpm, 10**9, 10**6, ledger=tmp_path / "rates")
    while survivor.claim(time.monotonic(), 7):
        free += 1
    assert said <= rpm - free <= said + kills, "at most the one claim that was not said yet, for each kill"


def test_participants_are_counted_while_they_live(tmp_path: Path) -> None:
    folder = tmp_path / "users"
    script = (
        "import sys\nfrom pathlib import Path\nfrom agents.rates import Participants\n"
        f"with Participants(Path({str(folder)!r})) as all:\n    print(all.count(), flush=True)\n    sys.stdin.readline()\n"
        "print('left', flush=True)\nsys.stdin.readline()\n"
    )
    with Participants(folder) as mine:
        assert mine.count() == 1
        with child(script) as one, child(script) as other:
            assert {line(one), line(other)} <= {"2", "3"}
            assert mine.count() == 3
            one.kill()
            one.wait()
            assert mine.count() == 2, "killed with -9"
            go_on(other)
            assert line(other) == "left"
            assert mine.count() == 1
        assert len(list(folder.glob("*.lock"))) == 2, "the dead one's file is there until somebody comes"
        with Participants(folder) as second:
            assert second.count() == mine.count() == 2
            assert len(list(folder.glob("*.lock"))) == 2
    assert list(folder.glob("*.lock")) == []


def test_a_ledger_keeps_its_size_and_opens_nothing_more(tmp_path: Path) -> None:
    limited = Rates(10**4, 10**9, 10**6, ledger=tmp_path / "rates")
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for second in range(2000):
        assert limited.claim(second / 100, 10)
    if handles:
        assert len(os.listdir("/proc/self/fd")) == handles
    assert (tmp_path / "rates").stat().st_size < 2 * 2**20
