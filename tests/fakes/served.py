"""A fake server as a process of its own, which outlives what is killed around it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from tests.fakes.waiting import wait_for


@contextmanager
def served(program: str, folder: Path, **settings: str) -> Iterator[str]:
    """The URL of tests/fakes/PROGRAM.py, told `settings` through its environment; `folder` gets the file with its port."""
    port_file = folder / "port"
    child = subprocess.Popen([sys.executable, "-m", f"tests.fakes.{program}", port_file], env={**os.environ, **settings})
    try:
        wait_for("server", port_file.exists)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        child.kill()
        child.wait()


async def serve(app: web.Application, port_file: Path, port: int = 0) -> None:
    """In that process: serve for ever on a port of loopback (0: a free one), and write it down, whole or not at all."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    partial = port_file.with_suffix(".part")
    partial.write_text(str(runner.addresses[0][1]))
    os.replace(partial, port_file)
    await asyncio.Event().wait()
