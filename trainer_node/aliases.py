"""Aliases at the model server. The registry says first which version shall stand, then the server's aliases follow.

So what a crash leaves undone between the two is done by the next command on that name, and every command may be asked twice.
What an alias names is told by the server's digests, never by our notes. A tag whose digest is that of no version of ours was not
made by hafs: it is never moved and never deleted, and no alias of ours is made of it. What a job that has not ended makes or goes
on from is not deleted either.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.contracts.job import JobView
from config.contracts.wire import ModelsChanged, ModelsResult
from config.errors import JobFailed, JobNotFound, ProviderError, ProviderUnavailable, translate_os_errors
from config.faults import around
from config.locks import holder
from trainer_node import registry
from trainer_node.ollama import OllamaApi
from trainer_node.registry import ModelRecord
from trainer_node.runtime.launch import PROBE_TIMEOUT_S, RuntimeInfo, ensure_runtime, find_server, ollama_url

log = logging.getLogger("hafs")


@dataclass
class Settled:
    """The records as the server has them now, and what could not be done."""

    known: list[ModelRecord]
    notes: list[str] = field(default_factory=list)


def listing(root: Path) -> ModelsResult:
    """All versions, with the aliases that the server has now, where one answers; nothing is started and nothing changed."""
    known = [record for record in registry.records(root) if not record.deleted]
    tags = _tags_now(root, known) if known else None
    if tags is not None:
        known = carried(known, tags)
    views = [(record, record.view("" if tags is None else _amiss(record, known, tags))) for record in known]
    return ModelsResult(
        models=[view for record, view in views if record.passed],
        failed=[view for record, view in views if record.fault and not record.passed],
        checked=tags is not None,
    )


def server_of(root: Path, *, ollama: bool) -> RuntimeInfo:
    """The node's model server, started if it is hafs's own.

    Args:
        ollama: what is wanted is at an Ollama. One that is away for a moment is not replaced, unless a person says so.

    Raises:
        ProviderUnavailable: it is, and none answers.
    """
    found = find_server(root)
    if ollama and (found is None or found.embedded) and not _embedded_chosen():
        hint = "start it, or, where it is no longer to be used, set HAFS_RUNTIME=embedded on the node"
        raise ProviderUnavailable(f"no Ollama answers at {ollama_url()}, where the models of this node are", hint=hint)
    return found or ensure_runtime(root)


def at_ollama(known: Iterable[ModelRecord]) -> bool:
    """Whether the newest model of the node was registered at an Ollama."""
    newest = max(known, key=lambda record: record.created_at, default=None)
    return newest is not None and newest.server == registry.OLLAMA


def promote(api: OllamaApi, root: Path, model: str) -> ModelsChanged:
    """Let the aliases name a version that passed the gate.

    Raises:
        JobNotFound: there is none, or it did not pass.
        JobFailed: the server no longer has it, or has something else under its tag.
    """
    with registry.held(root) as known:
        record = registry.find([each for each in known if each.counts], model)
        if lost := _lost(record, api.tags()):
            raise JobFailed(
                f"{record.tag} cannot be promoted: {lost} ({api.url})", hint="train it again, or promote another version"
            )
        if registry.standing(known).get(record.latest) is not record:
            last = max(each.promotion for each in known if each.name == record.name)
            known = registry.replaced(known, record.model_copy(update={"promotion": last + 1}))
            registry.write(root, known)
        return _changed(_settle(api, root, known, record.name), [record.tag])


def rollback(api: OllamaApi, root: Path, model: str, leave: str = "") -> ModelsChanged:
    """Let an alias go back to the version that was promoted before the one that it names now, and the others with it.

    Args:
        model: the alias, or a name, which means its NAME:latest, or a version, which means the same.
        leave: the version that is to be left; where it no longer stands nothing is taken back.

    Raises:
        JobNotFound: no such model, or no version before it.
    """
    with registry.held(root) as known:
        now = carried(known, api.tags())
        left = registry.find([each for each in now if each.counts], leave or _holder(now, model))
        alias = next((each for each in left.wanted_aliases if each == registry.alias_of(model)), left.latest)
        stands = registry.standing(known).get(alias)
        if stands is not None and stands.tag == left.tag:
            if not any(each.counts and each.promotion and alias in each.wanted_aliases for each in known if each is not stands):
                raise JobNotFound(
                    f"{left.tag} is the only version that {alias} can name of those that were promoted",
                    hint="promote another one instead",
                )
            known = registry.replaced(known, left.model_copy(update={"promotion": 0}))
            registry.write(root, known)
        settled = _settle(api, root, known, left.name)
        back = registry.standing(settled.known).get(alias)
        return _changed(settled, list(dict.fromkeys([left.tag, *([back.tag] if back else [])])))


def delete(api: OllamaApi, root: Path, model: str, owed: Iterable[JobView] = ()) -> ModelsChanged:
    """Remove a version from the server, from the registry and from the disk. Its record stays, so its number is not reused.

    Args:
        owed: the jobs that have not ended.

    Raises:
        JobNotFound: no such version. An alias or a name is none.
        JobFailed: it carries an alias, or is needed.
    """
    with registry.held(root) as known:
        found = [each for each in known if each.is_called(model)]
        if not found:
            raise JobNotFound(f"no version {model!r} is on this node", hint="hafs models list shows the tags")
        tag = found[0].tag
        if carries := _kept(known, api.tags()).get(tag):
            raise JobFailed(f"{tag} is what {', '.join(carries)} names", hint="promote another version first, or roll back")
        if reason := _needed(root, known, owed).get(tag):
            raise JobFailed(f"{tag} is needed: {reason}", hint="wait for its end, or cancel it: hafs train status")
        return _remove(api, root, known, found)


def prune(
    api: OllamaApi, root: Path, keep: int, name: str = "", owed: Iterable[JobView] = (), *, dry_run: bool = False
) -> ModelsChanged:
    """Delete old versions of each name. What carries an alias stays, and what is needed or in the server's memory.

    Args:
        keep: so many of those that passed the gate stay, and so many of the others: a failed one pushes out no good one.
        owed: the jobs that have not ended.
    """
    with registry.held(root) as known:
        there = [each for each in known if not each.deleted and name.casefold() in ("", each.name)]
        if name and not there:
            raise JobNotFound(f"no model {name!r} was made on this node", hint="hafs models list shows them")
        kept = _kept(known, api.tags())
        old = [each for each in there if each.tag not in kept and _rank(each, there) >= keep]
        needed = {tag.casefold(): "it is loaded at the model server" for tag in api.loaded()}
        needed |= {tag.casefold(): reason for tag, reason in _needed(root, known, owed).items()}
        notes = [f"{each.tag} stays: {needed[each.tag]}" for each in old if each.tag in needed]
        going = [each for each in old if each.tag not in needed]
        if dry_run:
            return ModelsChanged(removed=[each.tag for each in going], notes=notes)
        removed = _remove(api, root, known, going)
        return removed.model_copy(update={"notes": [*notes, *removed.notes]})


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
        elif stands is not None and (lost := _lost(stands, tags)):
            notes.append(f"{alias} cannot name {stands.tag}: {lost}; promote another version")
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
            notes.append(f"{record.tag} at the server is not what hafs noted when it made it, and was left alone")
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


def _needed(root: Path, known: Sequence[ModelRecord], owed: Iterable[JobView]) -> dict[str, str]:
    """Why a version may not go now, by its tag: a job makes it or goes on from it, or another form of it is being made."""
    reasons = {record.tag: "another form of it is being made" for record in known if _exporting(root / record.folder)}
    counting = [record for record in known if record.counts]
    for job in owed:
        reasons |= {record.tag: f"job {job.id} makes it" for record in known if record.job == job.id}
        for start in registry.starts(root / "jobs" / job.id):
            try:
                reasons[registry.find(counting, start).tag] = f"job {job.id} goes on from it"
            except JobNotFound:  # the job itself will say so
                continue
    return reasons


def _exporting(folder: Path) -> bool:
    return any(holder(lock) is not None for lock in (folder / ".exports").glob("*.lock"))


def _rank(record: ModelRecord, there: Iterable[ModelRecord]) -> int:
    """How many newer ones there are of its name and its kind: passed, or not."""
    alike = (each for each in there if each.name == record.name and each.passed == record.passed)
    return sum(each.version > record.version for each in alike)


def _holder(now: Sequence[ModelRecord], model: str) -> str:
    """The tag that `model`, a name or an alias, names at the server; itself where it is a tag, or nothing of ours is there."""
    return next((record.tag for record in now if registry.alias_of(model) in record.aliases), model)


def _changed(settled: Settled, tags: Sequence[str]) -> ModelsChanged:
    by_tag = {record.tag: record for record in settled.known}
    return ModelsChanged(models=[by_tag[tag].view() for tag in tags], notes=settled.notes)


def _lost(record: ModelRecord, tags: Mapping[str, str]) -> str:
    """Why the server cannot answer as this version; "" if it can."""
    if record.tag not in tags:
        return "the server no longer has it"
    return "" if tags[record.tag] == record.digest else "what the server has under this tag is not what hafs made"


def _amiss(record: ModelRecord, known: Sequence[ModelRecord], tags: Mapping[str, str]) -> str:
    """What is not as it should be with a version at the server."""
    if lost := _lost(record, tags):
        return lost
    ours = {each.digest for each in known}
    shall = [alias for alias, stands in registry.standing(known).items() if stands.tag == record.tag]
    missing = [alias for alias in shall if alias not in record.aliases]
    if foreign := [alias for alias in missing if _digest(tags, alias) not in (None, *ours)]:
        return f"{', '.join(foreign)} at the server was not made by hafs and is left alone"
    return f"{', '.join(missing)} should name it, and does not: hafs models promote {record.tag}" if missing else ""


def _digest(tags: Mapping[str, str], alias: str) -> str | None:
    """As the server compares names. One that is ours only in another case is somebody else's: its digest decides."""
    return next((digest for tag, digest in tags.items() if tag.casefold() == alias.casefold()), None)


def _embedded_chosen() -> bool:
    return os.environ.get("HAFS_RUNTIME") == "embedded"


def _tags_now(root: Path, known: Sequence[ModelRecord]) -> dict[str, str] | None:
    """What the server that answers now has; None: none does, or not at once, or one that these models were never at."""
    server = find_server(root)
    if server is None or (server.embedded and at_ollama(known) and not _embedded_chosen()):
        return None
    try:
        with OllamaApi(server.url, answer_timeout_s=PROBE_TIMEOUT_S) as api:
            return api.tags()
    except ProviderError:
        return None
