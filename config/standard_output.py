"""Standard output into a pipe or a file. Who reads a pipe may have enough (`hafs … | head`): the program ends without a word.

What goes wrong with it is told apart where it is written: further up it would pass for an error of some other file.
"""

import atexit
import errno
import io
import os
import sys

from config.errors import DiskFull, StoreError

READER_LEFT = 141  # exit code, as a shell counts the signal that ends other tools


def guard() -> None:
    """From now on a write to `sys.stdout` raises SystemExit where its reader has left, and DiskFull or StoreError else.

    A terminal, and what a test has put in its place, are left as they are.
    """
    stream = sys.stdout
    if (
        not isinstance(stream, io.TextIOWrapper)
        or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO)
        or stream.isatty()
    ):
        return  # without a console there is none at all
    stream.flush()
    plain = _Plain(stream.fileno(), "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(
        plain if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(plain),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Plain(io.FileIO):
    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL):  # Windows has two words for it
                self._discard()
                raise SystemExit(READER_LEFT) from None
            atexit.register(self._discard)  # else Python's own last flush fails as well, with words and an exit code of its own
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise kind(
                f"cannot write to standard output: {error.strerror}", hint="look at where it goes; the rest of it is lost"
            ) from error

    def _discard(self) -> None:
        """What is still in a buffer goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
