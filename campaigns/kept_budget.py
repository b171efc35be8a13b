"""A budget that a crash does not forget.

What is reserved for calls under way, or spent on calls that are not on the disk yet, is written down before it is reserved: never
less than it is, in steps, so that this is seldom. What a crash leaves counts as spent: nobody knows what became of those calls.
Calls whose answers are found again after a crash (batches) are not part of it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from pydantic import ValidationError

from agents.budget import Budget, Reservation
from agents.prices import Price
from agents.task import Sampling
from config.contracts.base import Tolerant
from config.contracts.sample import Message
from config.errors import StoreCorrupt, StoreError, translate_os_errors
from config.files import sync_folder, write_atomic

log = logging.getLogger("hafs.campaign")

_STEP = 1.5  # what is written down is that much more than what is held
_TOO_MUCH = 3.0  # … and is corrected when it is more than that
_NOTHING = 1e-9  # USD; sums that go up and down keep rounding errors


class LeftBehind(Tolerant):
    """The file. `run` names the process that wrote it, so that what it left is booked once."""

    run: str
    usd: float


class KeptBudget(Budget):
    """Args:
    path: where it is written down.
    stored: USD of all calls that are on the disk.
    found_again: prices of the lanes whose answers survive a crash.
    """

    def __init__(self, max_usd: float | None, path: Path, stored: Callable[[], float], found_again: Sequence[Price] = ()) -> None:
        super().__init__(max_usd)
        self._path, self._stored, self._found_again = path, stored, found_again
        self._run = uuid4().hex
        self._safe_usd = 0.0  # reserved for calls that are found again
        self._written_usd = 0.0
        self._complained = False

    def reserve(
        self, price: Price | None, messages: Sequence[Message], sampling: Sampling, thinking_tokens: int = 0
    ) -> Reservation:
        """As `Budget.reserve`."""
        reservation = super().reserve(price, messages, sampling, thinking_tokens)
        if self._is_safe(reservation):
            self._safe_usd += reservation.usd
        if self._at_risk_usd > self._written_usd:
            self._write(_STEP * self._at_risk_usd)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """As `Budget.release`."""
        super().release(reservation)
        if self._is_safe(reservation):
            self._safe_usd -= reservation.usd

    def trim(self) -> None:
        """Write down less where less is held by now. To be called now and then, and at the end."""
        usd = self._at_risk_usd
        if usd < _NOTHING:
            usd = 0.0
        if self._written_usd > _TOO_MUCH * usd:
            self._write(_STEP * usd)

    def left_behind(self) -> LeftBehind | None:
        """What an earlier run had written down when it was cut off. It is there until the next `trim`.

        Raises:
            StoreCorrupt: the file is none of a campaign.
        """
        try:
            found = LeftBehind.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StoreCorrupt(
                f"{self._path}: not what a campaign writes", hint="remove it if no paid call was under way at the last crash"
            ) from error
        self._written_usd = found.usd
        return found

    @property
    def _at_risk_usd(self) -> float:
        return self.spent_usd + self.reserved_usd - self._safe_usd - self._stored()

    def _is_safe(self, reservation: Reservation) -> bool:
        return any(reservation.price is price for price in self._found_again)

    def _write(self, usd: float) -> None:
        """A disk that takes nothing does not stop calls: the store pauses the campaign, and says so."""
        try:
            self._replace(usd if self.max_usd is None else min(usd, self.max_usd - self._stored()))
            self._complained = False
        except StoreError as error:
            if not self._complained:
                log.warning("what calls under way may cost cannot be written down, so a crash would forget it: %s", error)
            self._complained = True
        self._written_usd = usd

    def _replace(self, usd: float) -> None:
        if not self._path.parent.is_dir():
            raise StoreError(f"{self._path.parent} is not there")  # and making it would hide that from the store
        if usd:
            write_atomic(self._path, LeftBehind(run=self._run, usd=usd).model_dump_json().encode())
            return
        with translate_os_errors(self._path):
            self._path.unlink(missing_ok=True)
            sync_folder(self._path.parent)
