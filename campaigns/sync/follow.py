"""Push what a running campaign adds, every few seconds, until it has ended. A lost node is waited for; the campaign never waits.

Whether the campaign still runs is asked before its file is read, so the last push has all of it.
"""

from collections.abc import Callable

import tenacity

from campaigns.datasets import has_rows, sealing_named
from campaigns.store import CampaignFiles
from campaigns.sync.push import OnProgress, PushResult, push
from campaigns.sync.remote import Node
from config.errors import NodeUnreachable
from config.locks import holder
from config.settings import Settings

EVERY_S = 5.0
OnRound = Callable[[PushResult | NodeUnreachable], None]  # a push with something new, or the first of several that failed


def push_following(settings: Settings, node: Node, names: list[str], on_progress: OnProgress, on_round: OnRound) -> PushResult:
    """Push now and then until none of these campaigns runs any more; the result is that of the last push alone.

    Raises:
        NodeUnreachable: the campaigns have ended, and the node is still not to be reached.
        StoreError, ConfigError: they have ended without a row.
        NodeError: the node refuses what it gets.
    """
    following = _Following(settings, node, names, on_progress, on_round)
    rounds = tenacity.Retrying(wait=lambda _: EVERY_S, retry=tenacity.retry_if_result(lambda result: result is None))
    result = rounds(following.round)
    assert result is not None, "retried until there is one"
    return result


class _Following:
    def __init__(self, settings: Settings, node: Node, names: list[str], on_progress: OnProgress, on_round: OnRound) -> None:
        self._settings, self._node, self._names = settings, node, names
        self._on_progress, self._on_round = on_progress, on_round
        self._lost = False

    def round(self) -> PushResult | None:
        """One push; None while a campaign runs."""
        running = any(holder(CampaignFiles(self._settings, name).lock) is not None for name in self._names)
        names = [name for name in self._names if has_rows(self._settings, name)] if running else self._names
        if not names:
            return None
        try:
            with sealing_named(self._settings, names) as sealing:
                result = push(self._node, sealing, self._on_progress)
        except NodeUnreachable as error:
            if not running:
                raise
            if not self._lost:
                self._on_round(error)
            self._lost = True
            return None
        if running and (result.new or self._lost):
            self._on_round(result)
        self._lost = False
        return None if running else result
