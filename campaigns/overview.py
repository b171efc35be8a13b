"""`hafs status`: campaigns here, jobs and models on every node. A node that does not answer is unknown, not failed."""

from dataclasses import dataclass, field

from campaigns.status import CampaignStatus, names
from campaigns.sync.remote import connect
from config.contracts.job import JobView
from config.contracts.wire import MODELS, STATUS, JobArgs, ModelVersion, Nothing
from config.errors import HafsError
from config.settings import LOCAL, Settings


@dataclass
class NodeOverview:
    """`problem` says why a node could not be asked."""

    name: str
    jobs: list[JobView] = field(default_factory=list)
    models: list[ModelVersion] = field(default_factory=list)
    problem: str = ""


@dataclass
class Overview:
    home: str
    campaigns: list[CampaignStatus]
    nodes: list[NodeOverview]


def overview(settings: Settings) -> Overview:
    campaigns = [CampaignStatus(settings, name) for name in names(settings)]
    return Overview(str(settings.home), campaigns, [_node(settings, name) for name in (LOCAL, *settings.nodes())])


def _node(settings: Settings, name: str) -> NodeOverview:
    seen = NodeOverview(name)
    try:
        with connect(settings, name) as node:
            seen.jobs = node.call(STATUS, JobArgs()).jobs
            seen.models = node.call(MODELS, Nothing()).models
    except HafsError as error:
        seen.problem = str(error)
    return seen
