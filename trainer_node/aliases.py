"""Aliases at the model server. The registry says first which version shall stand, then the server's aliases follow.

So what a crash leaves undone between the two is done by the next command on that name, and every command may be asked twice.
What an alias names is told by the server's digests, never by our notes. A tag whose digest is that of no version of ours was not
made by hafs: it is never moved and never deleted.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from config.contracts.wire import ModelsChanged, ModelsResult
from config.errors import JobFailed, JobNotFound, translate_os_errors
from config.faults import around
from trainer_node import registry
from trainer_node.ollama import OllamaApi
from trainer_node.registry import ModelRecord
from trainer_node.runtime.launch import PROBE_TIMEOUT_S, find_server

log = logging.getLogger("hafs")


@dataclass
class Settled:
    """The records as the server has them now, and what could not be done."""

    known: list[ModelRecord]
    notes: list[str] = field(default_factory=list)


def listing(root: Path) -> ModelsResult:
    """All versions, with the aliases that the server has now, where one answers; nothing is started and nothing changed."""
    known = [record for record in registry.records(root) if not record.deleted]
    tags = _tags_now(root) if known else None
    if tags is not None:
        known = carried(known, tags)
    views = [(record, record.view("" if tags is None else _amiss(record, known, tags))) for record in known]
    return ModelsResult(
        models=[view for record, view in views if record.passed],
        failed=[view for record, view in views if record.fault and not record.passed],
        checked=tags is not None,
    )


def promote(api: OllamaApi, root: Path, model: str) -> ModelsChanged:
    """Let the aliases name a version that passed the gate.

    Raises:
        JobNotFound: there is none, or it did not pass.
        JobFailed: the server no longer has it.
    """
    with registry.held(root) as known:
        record = registry.find([each for each in known if each.counts], model)
        if record.tag not in api.tags():
            raise JobFailed(f"{api.url} has no {record.tag} any more", hint="train it again, or promote another version")
        if registry.standing(known).get(record.latest) is not record:
            last = max(each.promotion for each in known if each.name == record.name)
            known = registry.replaced(known, record.model_copy(update={"promotion": last + 1}))
            registry.write(root, known)
        return _changed(_settle(api, root, known, record.name), [record.tag])


def rollback(api: OllamaApi, root: Path, model: str, leave: str = "") -> ModelsChanged:
    """Let the aliases go back to the version that was promoted before the one that `model` names now.

    Args:
        leave: the version that is to be left; where it no longer stands nothing is taken back.

    Raises:
        JobNotFound: no such model, or no version before it.
    """
    with registry.held(root) as known:
        now = carried(known, api.tags())
        left = registry.find([each for each in now if each.counts], leave or _holder(now, model))
        before = [each for each in known if each.counts and each.name == left.name and each.promotion and each.tag != left.tag]
        if left.promotion and left.promotion == max([left.promotion, *(each.promotion for each in before)]):
            if not before:
                raise JobNotFound(
                    f"{left.tag} is the only version of {left.name} that was ever promoted", hint="promote another one instead"
                )
            known = registry.replaced(known, left.model_copy(update={"promotion": 0}))
            registry.write(root, known)
        settled = _settle(api, root, known, left.name)
        back = registry.standing(settled.known).get(left.latest)
        return _changed(settled, [left.tag, *([back.tag] if back else [])])


def delete(api: OllamaApi, root: Path, model: str) -> ModelsChanged:
    """Remove a version from the server, from the registry and from the disk. Its record stays, so its number is not reused.

    Raises:
        JobNotFound: no such version. An alias or a name is none.
        JobFailed: it carries an alias.
    """
    with registry.held(root) as known:
        found = [each for each in known if model.casefold() in (each.tag.casefold(), f"{each.name}:v{each.version}")]
        if not found:
            raise JobNotFound(f"no version {model!r} is on this node", hint="hafs models list shows the tags")
        kept = _kept(known, api.tags())
        if found[0].tag in kept:
            raise JobFailed(
                f"{found[0].tag} is what {', '.join(kept[found[0].tag])} names",
                hint="promote another version first, or roll back",
            )
        return _remove(api, root, known, found)


def prune(api: OllamaApi, root: Path, keep: int, name: str = "", *, dry_run: bool = False) -> ModelsChanged:
    """Delete all but the `keep` newest versions of each name, and those that carry an alias."""
    with registry.held(root) as known:
        there = [each for each in known if not each.deleted and name in ("", each.name)]
        if name and not there:
            raise JobNotFound(f"no model {name!r} was made on this node", hint="hafs models list shows them")
        newest = {
            (each.name, each.version)
            for of in {each.name for each in there}
            for each in sorted((each for each in there if each.name == of), key=lambda each: -each.version)[:keep]
        }
        kept = _kept(known, api.tags())
        going = [each for each in there if (each.name, each.version) not in newest and each.tag not in kept]
        if dry_run:
            return ModelsChanged(removed=[each.tag for each in going])
        return _remove(api, root, known, going)


def carried(known: Sequence[ModelRecord], tags: Mapping[str, str]) -> list[ModelRecord]:
    """The records with the aliases that the server has now. Of versions that are the same to it the standing one counts."""
    standing = registry.standing(known)
    owners: dict[str, ModelRecord] = {}
    for alias in {alias for record in known for alias in record.wanted_aliases}:
        digest = _digest(tags, alias)
        if digest is None:
            continue
        same = [each for each in known if alias in each.wanted_aliases and each.digest == digest]
        if same:
            stands = standing.get(alias)
            owners[alias] = stands if stands in same else max(same, key=lambda each: each.version)
    return [
        record.model_copy(update={"aliases": [alias for alias in record.wanted_aliases if owners.get(alias) is record]})
        for record in known
    ]


def _settle(api: OllamaApi, root: Path, known: Sequence[ModelRecord], name: str) -> Settled:
    """Make the server's aliases of a name what the registry says, as far as they are ours, and note what they are then."""
    tags = api.tags()
    ours = {record.digest for record in known if record.digest}
    notes: list[str] = []
    standing = registry.standing(known)
    for alias in sorted({alias for record in known if record.name == name for alias in record.wanted_aliases}):
        present, stands = _digest(tags, alias), standing.get(alias)
        if present is not None and present not in ours:
            tag = f"use {stands.tag}, or copy it yourself" if stands else "nothing of ours has to be there"
            notes.append(f"{alias} at the server was not made by hafs and was left alone; {tag}")
        elif stands is not None and stands.tag not in tags:
            notes.append(f"{alias} cannot name {stands.tag}: the server no longer has it; promote another version")
        elif stands is not None and present != stands.digest:
            with around("alias.copy"):
                api.copy(stands.tag, alias)
            log.info("%s is now %s", alias, stands.tag)
        elif stands is None and present is not None:
            with around("alias.remove"):
                api.delete(alias)
            notes.append(f"{alias} is gone: no version that it could name stands any more")
    settled = Settled(carried(known, api.tags()), notes)
    registry.write(root, settled.known)
    return settled


def _remove(api: OllamaApi, root: Path, known: Sequence[ModelRecord], going: Iterable[ModelRecord]) -> ModelsChanged:
    """The records say first which versions are gone; what a crash then leaves of one is removed by the next who deletes."""
    gone = [record.model_copy(update={"deleted": True, "aliases": []}) for record in going]
    known = registry.replaced(known, *gone)
    registry.write(root, known)
    tags, notes = api.tags(), []
    for record in (each for each in known if each.deleted):
        if record.tag in tags and tags[record.tag] == record.digest:
            with around("version.delete"):
                api.delete(record.tag)
        elif record.tag in tags and record in gone:
            notes.append(f"{record.tag} at the server is not the one that hafs made, and was left alone")
        with translate_os_errors(root / record.folder), around("version.files"):
            if (root / record.folder).exists():
                shutil.rmtree(root / record.folder)
    return ModelsChanged(removed=[record.tag for record in gone], notes=notes)


def _kept(known: Sequence[ModelRecord], tags: Mapping[str, str]) -> dict[str, list[str]]:
    """The aliases that each version carries, or shall carry, by its tag: such a version is not deleted."""
    kept: dict[str, list[str]] = {}
    for record in carried(known, tags):
        shall = [alias for alias, stands in registry.standing(known).items() if stands.tag == record.tag]
        if aliases := sorted({*record.aliases, *shall}):
            kept[record.tag] = aliases
    return kept


def _holder(now: Sequence[ModelRecord], model: str) -> str:
    """The tag that `model`, a name or an alias, names at the server; itself where it is a tag, or nothing of ours is there."""
    alias = model.casefold() if ":" in model else f"{model.casefold()}:latest"
    return next((record.tag for record in now if alias in record.aliases), model)


def _changed(settled: Settled, tags: Sequence[str]) -> ModelsChanged:
    by_tag = {record.tag: record for record in settled.known}
    return ModelsChanged(models=[by_tag[tag].view() for tag in tags], notes=settled.notes)


def _amiss(record: ModelRecord, known: Sequence[ModelRecord], tags: Mapping[str, str]) -> str:
    """What is not as it should be with a version at the server."""
    if record.tag not in tags:
        return "the server no longer has it"
    if record.digest and tags[record.tag] != record.digest:
        return "what the server has under this tag is not what hafs made"
    shall = [alias for alias, stands in registry.standing(known).items() if stands.tag == record.tag]
    if missing := [alias for alias in shall if alias not in record.aliases]:
        return f"{', '.join(missing)} should name it, and does not: hafs models promote {record.tag}"
    return ""


def _digest(tags: Mapping[str, str], alias: str) -> str | None:
    """As the server compares names. One that is ours only in another case is somebody else's: its digest decides."""
    return next((digest for tag, digest in tags.items() if tag.casefold() == alias.casefold()), None)


def _tags_now(root: Path) -> dict[str, str] | None:
    """What the server that answers now has; None: none does, or not at once."""
    server = find_server(root)
    try:
        answer = httpx.get(f"{server.url}/api/tags", timeout=PROBE_TIMEOUT_S, trust_env=False) if server else None
        return (
            None
            if answer is None
            else {str(each["name"]): str(each["digest"]) for each in answer.raise_for_status().json()["models"]}
        )
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
