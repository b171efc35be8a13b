"""A power cut at every single operation of the store: nothing that was acknowledged is lost, doubled or torn."""

import random
import shutil
from collections import Counter
from pathlib import Path

import anyio
import pytest

from campaigns import index, rowfile
from campaigns.rows import read_lines
from campaigns.store import Store
from config import files as config_files
from config.errors import StoreCorrupt
from tests.fakes.campaign_rows import VERDICTS, append, files, store
from tests.fakes.power_cut import ForgetfulDisk, PowerCut

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs to know which file a handle is of")
LIFE = 32
AT_ONCE = 3


class Campaign:
    """One campaign over several power cuts."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.acknowledged: dict[int, str] = {}
        self.next = 0

    def live(self, disk: ForgetfulDisk) -> None:
        """Start, append until the power is cut; what `append` returned for counts as acknowledged."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (rowfile, config_files, index):
                patch.setattr(module, "os", disk)
            try:
                with store() as opened:
                    for _ in range(3):
                        anyio.run(self._several, opened)
            except BaseException as error:
                if not _is_cut(error):
                    raise

    async def _several(self, opened: Store) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(AT_ONCE):
                group.start_soon(self._one, opened, self.next, self.chance.choice(VERDICTS))
                self.next += 1

    async def _one(self, opened: Store, number: int, verdict: str) -> None:
        await append(opened, number, verdict)
        self.acknowledged[number] = verdict

    def check(self) -> None:
        """What a start after the power cut finds."""
        with store() as opened:
            tally = opened.tally
        rows = {verdict: [row["id"] for row in read_lines(path)] for verdict, path in _files().items()}
        calls = {call["task_id"]: call["verdict"] for call in read_lines(files().calls)}
        ids = [*rows["accepted"], *rows["rejected"]]
        assert len(set(ids)) == len(ids), "a row is there twice"
        assert len(calls) == tally.calls == sum(1 for _ in read_lines(files().calls)), "a call is there twice"
        assert {f"t{number}": verdict for number, verdict in self.acknowledged.items()}.items() <= calls.items()
        for verdict in ("accepted", "rejected"):
            assert [task for task, each in calls.items() if each == verdict] == rows[verdict], "rows and calls differ"
        counted = Counter(calls.values())
        assert (tally.counts.accepted["asm"], tally.counts.rejected["asm"]) == (counted["accepted"], counted["rejected"])
        for path in (files().samples, files().rejected, files().calls):
            assert path.read_bytes()[-1:] in (b"", b"\n"), "a line is torn"
            assert b"\0" not in path.read_bytes()


def _files() -> dict[str, Path]:
    return {"accepted": files().samples, "rejected": files().rejected}


def _is_cut(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_cut(each) for each in error.exceptions)
    return isinstance(error, PowerCut) or (isinstance(error, Exception) and "a write was cut off" in str(error))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut", range(LIFE))
def test_every_operation_may_be_the_last(home: Path, cut: int, seed: int) -> None:
    """The power goes at operation `cut` of the first life, and at the one after it in the second, which mends the first."""
    campaign = Campaign(seed * 1000 + cut)
    home.mkdir()
    for life in range(4):
        disk = ForgetfulDisk(home, cut + life % 2 if life < 2 else campaign.chance.randrange(LIFE))
        campaign.live(disk)
        if disk.left < 0:
            disk.wake(campaign.chance)
        campaign.check()


def test_a_life_of_the_store_is_covered(home: Path) -> None:
    home.mkdir()
    campaign, disk = Campaign(0), ForgetfulDisk(home, 10_000)
    campaign.live(disk)
    assert len(campaign.acknowledged) == 3 * AT_ONCE
    assert LIFE / 2 < disk.operations <= LIFE, f"{disk.operations} operations: not every one was cut"


def test_the_disk_does_forget(home: Path) -> None:
    """Without its fsyncs the store would not pass: the test above can fail."""
    failures = 0
    for cut in range(0, LIFE):
        campaign = Campaign(cut)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        disk = ForgetfulDisk(home, cut)
        disk.fsync = lambda handle: None  # type: ignore[method-assign]
        campaign.live(disk)
        if disk.left < 0:
            disk.wake(campaign.chance)
        try:
            campaign.check()
        except (AssertionError, StoreCorrupt):
            failures += 1
    assert failures > 5
