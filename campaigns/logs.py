"""Read a campaign's log, also while it grows."""

import time
from collections.abc import Iterator

from campaigns.status import CampaignStatus
from config.errors import StoreError
from config.locks import holder
from config.settings import Settings

POLL_S = 0.2  # a file has no portable event to wait for


def log_lines(settings: Settings, name: str, follow: bool) -> Iterator[str]:
    """Whole lines without their newline. Following ends when the campaign's process has ended.

    Raises:
        ConfigError: no such campaign.
    """
    files = CampaignStatus(settings, name).files
    if not files.log.exists():
        raise StoreError(f"{files.log}: no log", hint="the log appears when the campaign starts")
    rest = ""
    with open(files.log, encoding="utf-8", errors="replace") as file:
        while True:
            running = follow and holder(files.lock) is not None  # asked before the read: nothing it wrote is missed
            rest += file.read()
            *lines, rest = rest.split("\n")
            yield from lines
            if not running:
                break
            time.sleep(POLL_S)
    if rest:
        yield rest
