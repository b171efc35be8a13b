"""How far a campaign is: figures counted from its calls, live or from its files."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from campaigns.restore import count_calls
from campaigns.rows import since
from campaigns.spec import CampaignSpec
from campaigns.store import Call, CampaignFiles, read_spec
from campaigns.tally import Counts, LaneTally
from config.errors import ConfigError
from config.locks import holder
from config.settings import Settings

WINDOW_S = 60.0  # rate and ETA look back this far


@dataclass(frozen=True)
class CampaignEnd:
    """How a run ended: done, drained (Ctrl-C), budget, or exhausted (no cell had calls left). `new` are this run's samples."""

    reason: str
    message: str
    accepted: int
    new: int
    cost_usd: float


class Progress:
    """Counts of one campaign. Cost is in USD; rate in accepted samples a second over the last minute of work."""

    def __init__(self, spec: CampaignSpec) -> None:
        self.spec = spec
        self._counts = Counts()
        self._recent: deque[list[int]] = deque()  # [second, accepted samples in it]
        self._start = 0.0

    def started(self, before: Counts) -> None:
        """`before` is what earlier runs have done. Rates count from here: the time it lay still is not part of them."""
        self._counts = before.copy()
        self._start = time.time()
        self._recent.clear()

    def count(self, call: Call) -> None:
        self._counts.count(vars(call))
        self._remember(vars(call))

    def _remember(self, call: Mapping[str, Any]) -> None:
        if call["verdict"] != "accepted":
            return
        second = int(call["time"])
        if not self._recent or self._recent[-1][0] != second:
            self._recent.append([second, 0])
            while self._recent[0][0] < second - WINDOW_S:
                self._recent.popleft()
        self._recent[-1][1] += 1

    @property
    def accepted(self) -> Counter[str]:
        """By domain, as all counts of verdicts."""
        return self._counts.accepted

    @property
    def rejected(self) -> Counter[str]:
        return self._counts.rejected

    @property
    def failed(self) -> Counter[str]:
        return self._counts.failed

    @property
    def reasons(self) -> Counter[str]:
        """Why calls were rejected or failed."""
        return self._counts.reasons

    @property
    def lanes(self) -> dict[str, LaneTally]:
        """What each lane has done, in all runs."""
        return self._counts.lanes

    @property
    def cost_usd(self) -> float:
        return self._counts.cost_usd

    @property
    def assumed_usd(self) -> float:
        return self._counts.assumed_usd

    @property
    def done(self) -> int:
        return self.accepted.total()

    @property
    def calls(self) -> int:
        return self.done + self.rejected.total() + self.failed.total()

    @property
    def accept_rate(self) -> float | None:
        judged = self.done + self.rejected.total()
        return self.done / judged if judged else None

    @property
    def rate(self) -> float | None:
        """Accepted samples a second; None before the first."""
        now = time.time()
        begin = max(self._start, now - WINDOW_S)
        accepted = sum(count for second, count in self._recent if second + 1 > begin)
        return accepted / (now - begin) if accepted and now > begin else None

    @property
    def eta_s(self) -> float | None:
        rate = self.rate
        return max(0, self.spec.target - self.done) / rate if rate else None

    def share(self, domain: str) -> int:
        """Accepted samples wanted of a domain."""
        return round(self.spec.target * self.spec.domains[domain].share / sum(d.share for d in self.spec.domains.values()))


class CampaignStatus(Progress):
    """Progress read from the files. `holder` is the pid that writes them now, or None."""

    def __init__(self, settings: Settings, name: str) -> None:
        """Raises ConfigError where there is no such campaign."""
        self.files = CampaignFiles(settings, name)
        if not self.files.exists():
            known = ", ".join(names(settings)) or "none yet"
            raise ConfigError(f'no campaign "{name}" in {settings.training}', hint=f"campaigns: {known}")
        super().__init__(read_spec(self.files))
        self.holder = holder(self.files.lock)
        self._counts = count_calls(self.files.path).counts
        self._start = time.time() - WINDOW_S
        if self.holder is not None:  # a campaign that lies still has no rate
            for call in since(self.files.calls, self._start):
                self._remember(call)

    @property
    def state(self) -> str:
        if self.holder is not None:
            return "running"
        return "complete" if self.done >= self.spec.target else "stopped"


def names(settings: Settings) -> list[str]:
    """Campaigns below HAFS_HOME, in alphabetical order."""
    return sorted(path.parent.name for path in settings.training.glob("*/campaign.json"))
