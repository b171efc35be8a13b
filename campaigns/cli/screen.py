"""A picture on the terminal that is drawn anew in its place; where there is no terminal, nothing is drawn."""

from typing import Self

from rich.console import RenderableType
from rich.live import Live

from campaigns.cli import render


class Screen:
    """A context manager; what was drawn goes with it."""

    def __init__(self) -> None:
        self._width = render.console.width
        self._live = Live(console=render.console, auto_refresh=False, transient=True) if render.on_screen() else None

    @property
    def live(self) -> bool:
        """Whether there is a terminal to draw on; elsewhere lines are told."""
        return self._live is not None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def draw(self, picture: RenderableType) -> None:
        if self._live is None:
            return
        if render.console.width != self._width:  # a narrower terminal folds what is on it: it would be left behind in part
            self._width = render.console.width
            render.console.clear()
        self._live.update(picture, refresh=True)
