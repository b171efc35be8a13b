"""`hafs status`: campaigns here; data, jobs, models, GPU and server of every node. A node that does not answer is unknown."""

from collections.abc import Sequence
from dataclasses import dataclass

from campaigns.status import CampaignStatus, names
from campaigns.sync.survey import NodeState, survey
from config.contracts.wire import DatasetView
from config.settings import Settings


@dataclass(frozen=True)
class Overview:
    home: str
    campaigns: list[CampaignStatus]
    nodes: list[NodeState]


def overview(settings: Settings) -> Overview:
    """All of it now; nodes are asked at the same time, for some seconds at most."""
    nodes = survey(settings, whole=True)
    return Overview(str(settings.home), [CampaignStatus(settings, name) for name in names(settings)], nodes)


def pushed(nodes: Sequence[NodeState], campaign: str) -> dict[str, DatasetView]:
    """By node: the newest dataset there that has rows of a campaign."""
    found: dict[str, DatasetView] = {}
    for node in nodes:
        for dataset in node.seen.datasets:
            if campaign in dataset.campaigns:
                found.setdefault(node.name, dataset)
    return found
