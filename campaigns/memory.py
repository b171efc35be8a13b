"""Keeps a long run as small as a short one.

Buffers of ever other sizes leave holes between what lives on; the C library of Linux (glibc) keeps them until it is
asked: a campaign of 200,000 tasks grew by a fifth while what it used stayed the same. Other systems need no asking.
"""

import ctypes
from collections.abc import Callable

import anyio

EVERY_S = 5.0


def trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where there is none. Source: man 3 malloc_trim."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return None


async def give_holes_back() -> None:
    """Now and then, until cancelled. It takes about a millisecond each time."""
    trim = trimmer()
    while trim is not None:
        await anyio.sleep(EVERY_S)
        trim(0)
