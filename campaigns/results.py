"""What a job left on its node, and some of it fetched by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from campaigns.locate import find
from campaigns.sync import pull
from campaigns.sync.pull import ARTIFACTS_S, OnProgress
from campaigns.sync.remote import connect
from campaigns.sync.survey import NodeState, survey
from config.contracts.wire import ARTIFACTS, ArtifactsArgs, ArtifactsResult
from config.errors import JobNotFound
from config.settings import Settings


@dataclass(frozen=True)
class Results:
    """The files of a registered version and the node that has them."""

    node: str
    found: ArtifactsResult


def results_of(settings: Settings, text: str, node: str = "") -> Results:
    """The files of a job (id, start of one, model name) or of a version (hafs-coder:v2).

    Raises:
        JobNotFound: there is no such job or version, or the job has registered nothing.
        NodeUnreachable: its node does not answer.
    """
    states = survey(settings, [node] if node else (), whole=":" in text)
    name, tag = _version(states, text) if ":" in text else _of_job(states, text)
    with connect(settings, name) as remote:
        return Results(name, remote.call(ARTIFACTS, ArtifactsArgs(model=tag), ARTIFACTS_S))


def fetch(settings: Settings, results: Results, names: Sequence[str], on_progress: OnProgress) -> Path:
    """Fetch files, or folders with all in them, into models/<name>/v<N>; returns that folder.

    Raises:
        JobNotFound: nothing has such a name.
        NodeError, TransferError, StoreError: as a pull.
    """
    listed = [artifact.name for artifact in results.found.files]
    wanted: set[str] = set()
    for name in names:
        inside = name.rstrip("/") + "/"
        matching = [each for each in listed if each == name or each.startswith(inside)]
        if not matching:
            raise JobNotFound(f'{results.found.tag} has no "{name}"', hint=f"it has: {', '.join(listed)}")
        wanted.update(matching)
    with connect(settings, results.node) as remote:
        return pull.fetch(remote, settings, results.found, on_progress, wanted)


def _version(states: Sequence[NodeState], tag: str) -> tuple[str, str]:
    for state in states:
        for model in state.seen.models:
            if tag in (model.tag, model.alias, *model.aliases):
                return state.name, model.tag
    raise JobNotFound(f'no node has a model "{tag}"', hint="hafs models list shows them")


def _of_job(states: Sequence[NodeState], text: str) -> tuple[str, str]:
    at = find(states, text)
    if at.job.result is None:
        hint = f"an older version is named with its number: {at.job.name}:v1"
        raise JobNotFound(f"job {at.job.id} on {at.node} has registered nothing (it is {at.job.state})", hint=hint)
    return at.node, at.job.result.model
