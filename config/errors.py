"""Every error a person can meet. One tree; each class has an exit code, and each error says what to do next.

HafsError                    1
├── ConfigError              3    a TOML file or setting is wrong (file, line, key)
│   └── SourceMissing        4    a source folder or pattern of the spec holds nothing
├── MissingExtra             5    a package of an optional extra is not installed
├── ProviderError           10    a model server did not do its work
│   ├── ProviderUnavailable 11    it cannot be reached, or answers 5xx
│   │   └── Overloaded      18    503: it is there, but takes no more now
│   ├── AuthFailed          12    key missing or refused
│   ├── RateLimited         13    429, with the wait it asks for
│   ├── BadRequest          14    400, 404, 501: never worth a retry
│   │   └── ModelMissing    17    the server does not have the model
│   └── Blocked             15    refused for safety
├── BudgetExceeded          16
├── StoreError              20    files of a campaign
│   ├── StoreHeld           21    another process writes it
│   ├── DiskFull            22
│   ├── StoreCorrupt        23
│   └── SpecChanged         24    the campaign was started with another spec
├── NodeError               30
│   ├── NodeUnreachable     31
│   ├── HostKeyRefused      32    unknown or changed host key
│   ├── ProtocolError       33    version skew, unknown verb, broken line
│   └── TransferError       34    what arrived is not what was sent
└── JobError                40
    ├── JobNotFound         41
    ├── JobFailed           42
    ├── JobCancelled        43
    ├── GateFailed          44    the tuned model did not pass the smoke gate
    └── LeaseLost           45    the attempt was given up, its device belongs to another
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # exit code after Ctrl-C


class HafsError(Exception):
    """An error with a message (what, where) and a hint (what to do)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(HafsError):
    exit_code = 3


class SourceMissing(ConfigError):
    exit_code = 4


class MissingExtra(HafsError):
    exit_code = 5


class ProviderError(HafsError):
    exit_code = 10


class ProviderUnavailable(ProviderError):
    """`billable` False: it was not reached or refused with a 5xx, so nothing was generated; True also where nobody knows.

    `retry_after_s` is what the server asked for, None if it did not say.
    """

    exit_code = 11

    def __init__(self, message: str, *, billable: bool = True, retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.billable = billable
        self.retry_after_s = retry_after_s


class Overloaded(ProviderUnavailable):
    """503: it is there, but takes no more now; nothing was generated."""

    exit_code = 18

    def __init__(self, message: str, *, retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, billable=False, retry_after_s=retry_after_s, hint=hint)


class AuthFailed(ProviderError):
    exit_code = 12


class RateLimited(ProviderError):
    """429. `retry_after_s` is what the server asked for, None if it did not say; `per_day` is an exhausted daily quota."""

    exit_code = 13

    def __init__(self, message: str, *, retry_after_s: float | None = None, per_day: bool = False, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        self.per_day = per_day


class BadRequest(ProviderError):
    """`parameter` names what the model refuses to be told, or the limit that it exceeds; empty: something else is wrong."""

    exit_code = 14

    def __init__(self, message: str, *, parameter: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.parameter = parameter


class ModelMissing(BadRequest):
    exit_code = 17


class Blocked(ProviderError):
    exit_code = 15


class BudgetExceeded(HafsError):
    exit_code = 16


class StoreError(HafsError):
    exit_code = 20


class StoreHeld(StoreError):
    exit_code = 21


class DiskFull(StoreError):
    exit_code = 22


class StoreCorrupt(StoreError):
    exit_code = 23


class SpecChanged(StoreError):
    exit_code = 24


class NodeError(HafsError):
    exit_code = 30


class NodeUnreachable(NodeError):
    exit_code = 31


class HostKeyRefused(NodeError):
    exit_code = 32


class ProtocolError(NodeError):
    exit_code = 33


class TransferError(NodeError):
    exit_code = 34


class JobError(HafsError):
    exit_code = 40


class JobNotFound(JobError):
    exit_code = 41


class JobFailed(JobError):
    exit_code = 42


class JobCancelled(JobError):
    exit_code = 43


class GateFailed(JobError):
    exit_code = 44


class LeaseLost(JobError):
    exit_code = 45


def all_errors(root: type[HafsError] = HafsError) -> list[type[HafsError]]:
    """The tree, depth first, with `root` first."""
    return [root, *(error for child in root.__subclasses__() for error in all_errors(child))]


def error_named(name: str) -> type[HafsError]:
    """The class with that name; HafsError for a name this version does not know (a newer peer may have sent it)."""
    return next((error for error in all_errors() if error.__name__ == name), HafsError)


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write under `path` into an error of ours.

    Raises:
        DiskFull: no space or quota left.
        StoreError: any other failure of the operating system.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left for {where}",
                hint="free some space (or set HAFS_HOME to another disk) and run the same command again: it continues",
            ) from error
        raise StoreError(f"cannot write {where}: {error.strerror}", hint="check that the folder exists and is yours") from error
