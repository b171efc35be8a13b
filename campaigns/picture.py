"""A campaign as anybody can see it: what its process tells of itself while one runs, else what its files say."""

from dataclasses import dataclass

from campaigns.live import EndFigures, Figures, LaneFigures, LiveState, figures_of, read
from campaigns.status import CampaignStatus, names
from campaigns.store import CampaignFiles
from config.errors import ConfigError
from config.locks import holder
from config.settings import Settings


@dataclass(frozen=True)
class Picture:
    """`pid` holds the campaign now; None: nobody. `lanes` and `end` are those of its last run."""

    name: str
    files: CampaignFiles
    state: str
    pid: int | None
    figures: Figures
    lanes: list[LaneFigures]
    reserved_usd: float = 0.0
    end: EndFigures | None = None

    @property
    def running(self) -> bool:
        return self.pid is not None


def look_at(settings: Settings, name: str) -> Picture:
    """A campaign now: what its process says while one runs, else what the files say. Raises ConfigError where there is none."""
    files = find(settings, name)
    pid, live = holder(files.lock), read(files)
    if pid is None or live is None or live.pid != pid:
        return picture_of(CampaignStatus(settings, name))
    return as_told(files, live)


def as_told(files: CampaignFiles, live: LiveState) -> Picture:
    """A campaign as its own process describes it."""
    return Picture(files.name, files, live.state, live.pid, live.figures, live.lanes, live.reserved_usd, live.end)


def picture_of(status: CampaignStatus) -> Picture:
    """A campaign as its files have it."""
    live = read(status.files)
    state = status.state
    if status.holder is None and state == "stopped":
        state = _why_stopped(live)
    lanes = live.lanes if live and status.holder in (None, live.pid) else []
    return Picture(
        status.spec.name,
        status.files,
        state,
        status.holder,
        figures_of(status),
        lanes,
        end=live.end if live else None,
    )


def find(settings: Settings, name: str) -> CampaignFiles:
    """The files of a campaign that exists. Raises ConfigError, naming those there are."""
    files = CampaignFiles(settings, name)
    if not files.exists():
        known = ", ".join(names(settings)) or "none yet"
        raise ConfigError(f'no campaign "{name}" in {settings.training}', hint=f"campaigns: {known}")
    return files


def _why_stopped(live: LiveState | None) -> str:
    if live is None:
        return "stopped"
    if live.end is None:
        return "stopped: cut off (killed, its terminal closed, or the power failed)"
    words = {"drained": "", "budget": "at the budget", "error": live.end.message, "exhausted": "no further calls would help"}
    why = words.get(live.end.reason, live.end.reason)
    return f"stopped: {why}" if why else "stopped"
