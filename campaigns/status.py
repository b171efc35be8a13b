"""How far a campaign is: figures counted from its calls, live or from its files."""

import time
from collections import Counter, deque
from dataclasses import dataclass

from campaigns.spec import CampaignSpec
from campaigns.store import Call, CampaignFiles, read_rows, read_spec
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
        self.accepted: Counter[str] = Counter()  # by domain
        self.rejected: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.cost_usd = 0.0
        self.assumed_usd = 0.0
        self._recent: deque[float] = deque()
        self._start = 0.0

    def started(self) -> None:
        """Rates count from here: the time a campaign lay still is not part of them."""
        self._start = time.time()
        self._recent.clear()

    def count(self, call: Call) -> None:
        counter = {"accepted": self.accepted, "rejected": self.rejected}.get(call.verdict, self.failed)
        counter[call.domain] += 1
        self.cost_usd += call.cost_usd
        self.assumed_usd += call.cost_usd * call.cost_assumed
        if call.verdict == "accepted":
            self._recent.append(call.time)
        else:
            self.reasons[call.reason] += 1

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
        while self._recent and self._recent[0] < begin:
            self._recent.popleft()
        return len(self._recent) / (now - begin) if self._recent and now > begin else None

    @property
    def eta_s(self) -> float | None:
        rate = self.rate
        return max(0, self.spec.target - self.done) / rate if rate else None

    def share(self, domain: str) -> int:
        """Accepted samples wanted of a domain."""
        return round(self.spec.target * self.spec.domains[domain] / sum(self.spec.domains.values()))


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
        self._start = time.time() - WINDOW_S
        for call in read_rows(self.files.calls, Call):
            self.count(call)

    @property
    def rate(self) -> float | None:
        return super().rate if self.holder is not None else None  # a campaign that lies still has none

    @property
    def state(self) -> str:
        if self.holder is not None:
            return "running"
        return "complete" if self.done >= self.spec.target else "stopped"


def names(settings: Settings) -> list[str]:
    """Campaigns below HAFS_HOME, in alphabetical order."""
    return sorted(path.parent.name for path in settings.training.glob("*/campaign.json"))
