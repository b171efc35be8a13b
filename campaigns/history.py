"""What earlier calls say about a lane: of this campaign and of others below HAFS_HOME, the newest first.

Only the end of each calls.jsonl is read: the last calls say most, and a file of a million lines is not worth a wait.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.spec import CampaignSpec
from config.settings import Settings

NEWEST = 20  # campaigns that are looked into
TAIL_BYTES = 1_000_000  # of each file: some thousand calls
ENOUGH = 20  # calls; fewer say little


@dataclass
class Past:
    """Answered calls of one lane and model. `accepted` of `answered` were samples; latencies in seconds; tokens a call."""

    answered: int = 0
    accepted: int = 0
    latency_s: list[float] = field(default_factory=list)
    prompt_tokens: list[float] = field(default_factory=list)
    completion_tokens: list[float] = field(default_factory=list)  # thinking included

    def count(self, call: dict[str, Any]) -> None:
        self.answered += 1
        self.accepted += call["verdict"] == "accepted"
        self.latency_s.append(call["latency_s"])
        self.prompt_tokens.append(call["prompt_tokens"])
        self.completion_tokens.append(call["completion_tokens"] + call.get("thinking_tokens", 0))


def past_calls(settings: Settings, spec: CampaignSpec) -> dict[str, Past]:
    """By lane of the spec: calls of that lane and model about these domains; where there are few, of that model on any lane."""
    files = sorted(settings.training.glob("*/calls.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)[:NEWEST]
    own: dict[tuple[str, str], Past] = {}
    any_lane: dict[str, Past] = {}
    for call in (call for path in files for call in _last_calls(path) if call["domain"] in spec.domains):
        own.setdefault((call["lane"], call["model"]), Past()).count(call)
        any_lane.setdefault(call["model"], Past()).count(call)
    found = {}
    for name, (_, model) in spec.lane_names().items():
        nearest = own.get((name, model), Past())
        past = nearest if nearest.answered >= ENOUGH else any_lane.get(model, Past())
        if past.answered >= ENOUGH:
            found[name] = past
    return found


def _last_calls(path: Path) -> Iterator[dict[str, Any]]:
    """The answered calls at the end of a file. A line that is none is passed over: history is only a help."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in lines[1 if size > TAIL_BYTES else 0 : -1]:
        try:
            call = json.loads(line)
            answered = call["verdict"] != "failed" and call["model"] and {"lane", "domain"} <= call.keys()
            numbers = all(isinstance(call[key], int | float) for key in ("latency_s", "prompt_tokens", "completion_tokens"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if answered and numbers:
            yield call
