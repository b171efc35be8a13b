"""What calls under way may cost is on the disk before they are sent, and counts as spent after a crash."""

import logging
from pathlib import Path

import anyio
import pytest

from agents.budget import Budget, Reservation
from agents.lanes import Endpoint, Lane
from agents.prices import Price
from agents.task import Sampling, Usage
from campaigns.kept_budget import KeptBudget
from campaigns.rows import read_rows
from campaigns.run import Campaign
from campaigns.store import Call
from config.contracts.sample import Message
from config.errors import AuthFailed, BudgetExceeded, StoreCorrupt
from config.settings import load_settings
from tests.fakes.campaign_rows import files, spec
from tests.fakes.fake_provider import FakeProvider

PRICE = Price(input_usd=0.0, output_usd=0.01)
ASKED = [Message(role="user", content="q")]
ONE = Sampling(max_tokens=10)  # 0.1 USD at worst
STORED = [0.0]


@pytest.fixture(autouse=True)
def _nothing_stored() -> None:
    STORED[0] = 0.0


def budget(folder: Path, max_usd: float | None = 10.0, found_again: tuple[Price, ...] = ()) -> KeptBudget:
    return KeptBudget(max_usd, folder / "reserved.json", lambda: STORED[0], found_again)


def reserve(held: Budget, price: Price | None = PRICE) -> Reservation:
    return held.reserve(price, ASKED, ONE)


def left(folder: Path) -> float:
    """What a process that starts now finds."""
    found = budget(folder).left_behind()
    return found.usd if found else 0.0


def test_what_is_held_or_not_stored_yet_is_on_the_disk_at_every_moment(tmp_path: Path) -> None:
    held = budget(tmp_path)
    reservations = [reserve(held) for _ in range(20) if left(tmp_path) >= held.reserved_usd]
    assert len(reservations) == 20
    for reservation in reservations:
        cost = held.settle(reservation, Usage(1, 5))
        held.trim()
        assert held.spent_usd + held.reserved_usd - STORED[0] <= left(tmp_path) <= 3.1
        STORED[0] += cost.usd
    held.trim()
    assert left(tmp_path) == 0.0
    assert not (tmp_path / "reserved.json").exists()


def test_it_is_seldom_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[float] = []
    monkeypatch.setattr(KeptBudget, "_replace", lambda self, usd: written.append(usd))
    held = budget(tmp_path, None)
    under_way = [reserve(held) for _ in range(128)]
    for _ in range(1000):
        STORED[0] += held.settle(reserve(held), Usage(1, 5)).usd
        held.trim()
    assert len(under_way) == 128
    assert 5 < len(written) < 20


def test_it_never_says_more_than_the_budget_has_left(tmp_path: Path) -> None:
    held = budget(tmp_path, 0.25)
    assert len([reserve(held) for _ in range(2)]) == 2
    assert left(tmp_path) == pytest.approx(0.25)
    with pytest.raises(BudgetExceeded):
        reserve(held)


def test_free_calls_and_calls_that_are_found_again_write_nothing(tmp_path: Path) -> None:
    batch = Price(input_usd=0.0, output_usd=0.01)
    held = budget(tmp_path, found_again=(batch,))
    reservations = [reserve(held, batch), reserve(held, None)]
    assert left(tmp_path) == 0.0
    other = reserve(held)
    assert left(tmp_path) == pytest.approx(0.15)
    for reservation in reservations:
        held.release(reservation)
    held.release(other)
    held.trim()
    assert left(tmp_path) == 0.0


def test_a_disk_that_takes_nothing_is_told_once_and_does_not_make_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone"
    held = budget(gone)
    with caplog.at_level(logging.WARNING, "hafs.campaign"):
        for _ in range(9):
            reserve(held)
    assert len(caplog.records) == 1
    assert not gone.exists()


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "reserved.json").write_text("{}")
    with pytest.raises(StoreCorrupt, match="reserved.json"):
        left(tmp_path)


def run_refused() -> None:
    """A run that ends at its first call, which is refused."""
    lane = Lane("l", FakeProvider([AuthFailed("no key")] * 99), "m", Endpoint("l", slots=1))

    async def work() -> None:
        with pytest.raises(AuthFailed):
            await Campaign(load_settings(), spec(budget={"max_usd": 2.0}), Path("."), {"l": lane}).run(lambda state: None)

    anyio.run(work)


def test_what_a_crash_left_is_booked_once_as_assumed(home: Path) -> None:
    files().path.mkdir(parents=True)
    reserve(budget(files().path))
    before = files().reserved.read_bytes()
    run_refused()
    assert not files().reserved.exists()
    files().reserved.write_bytes(before)  # cut off again between the two
    run_refused()
    assert not files().reserved.exists()
    [call] = read_rows(files().calls, Call)
    assert (call.verdict, call.reason, call.cost_assumed) == ("failed", "cut_off", True)
    assert call.cost_usd == pytest.approx(0.15)
