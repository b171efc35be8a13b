"""Serves one connection: one line of ASCII JSON in, one line out, until end of file. Nothing is kept between two lines.

Every whole line gets exactly one reply, whatever is in it; a line that the end of file cuts off is not carried out.
Nothing but replies reaches stdout: what any library prints goes to stderr. A job is queued here, anew or again; all else that
befalls it is the daemon's doing.
"""

import hashlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar, cast

from pydantic import ValidationError

from config.contracts import wire
from config.contracts.base import Tolerant
from config.contracts.job import JobError, TrainJob
from config.errors import HafsError, JobNotFound, MissingExtra, NodeError, ProtocolError, translate_os_errors
from config.faults import around
from trainer_node.daemon import daemon_pid, log_file
from trainer_node.events import read_events
from trainer_node.inbox import Inbox
from trainer_node.jobdir import JobDir
from trainer_node.logs import read_log, read_metrics
from trainer_node.processes import Child, start_detached
from trainer_node.queue import Queue
from trainer_node.refusals import note_refusal

if TYPE_CHECKING:  # loads httpx
    from trainer_node.ollama import OllamaApi
    from trainer_node.runtime.launch import RuntimeInfo

DAEMON_IDLE_EXIT_S = 900
BODY_CHUNK_BYTES = 2**17
UPGRADE = "upgrade the node, on the laptop: hafs nodes upgrade NAME"

A = TypeVar("A", bound=Tolerant)
R = TypeVar("R", bound=Tolerant)


def serve_stdio(root: Path) -> None:
    """Serve stdin and stdout. The real stdout is kept aside for replies; descriptor 1 becomes stderr."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(root, sys.stdin.buffer, replies)
    except BrokenPipeError:  # the laptop has gone, and nobody is left to answer
        return


def serve(root: Path, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer every line of `requests`.

    Raises:
        BrokenPipeError: nobody reads the replies.
    """
    service = Service(root)

    def tell(arrived: wire.Reply) -> None:
        _write(replies, arrived)

    try:
        for line in read_requests(requests):
            _write(replies, service.answer(line, lambda size: RequestBody(requests, size, tell)))
    finally:
        service.close()


def _write(replies: IO[bytes], reply: wire.Reply) -> None:
    replies.write(json.dumps(reply.model_dump(mode="json"), separators=(",", ":")).encode("ascii") + b"\n")
    replies.flush()


class RequestBody:
    """The bytes that follow a request. `tell` is called now and then while they come."""

    def __init__(self, stream: IO[bytes], size: int, tell: Callable[[wire.Reply], None]) -> None:
        self._stream, self._size, self._left, self._tell = stream, size, size, tell
        self._told_at = time.monotonic()

    def read(self, size: int, /) -> bytes:
        """Some bytes as soon as there are any; none at the end, which is early where the connection is lost."""
        data = cast(io.BufferedReader, self._stream).read1(min(size, self._left)) if self._left else b""
        self._left = self._left - len(data) if data else 0
        if data and time.monotonic() - self._told_at > wire.ARRIVED_EVERY_S:
            self._told_at = time.monotonic()
            self._tell(wire.Reply(arrived=self._size - self._left))
        return data

    def drain(self) -> None:
        """Read off what nobody has read."""
        while self.read(BODY_CHUNK_BYTES):
            pass


def _no_body(size: int) -> RequestBody:
    return RequestBody(io.BytesIO(), size, lambda _: None)


def read_requests(stream: IO[bytes]) -> Iterator[bytes | None]:
    """The whole lines, without their ends; None for one over the limit, which is skipped without being held in memory."""
    limit = wire.MAX_LINE_BYTES
    while line := stream.readline(limit + 1):
        oversized = len(line) > limit
        while line and not line.endswith(b"\n"):
            line = stream.readline(limit)
            oversized = oversized or bool(line)
        if line:
            yield None if oversized else line.rstrip(b"\r\n")


class Route(Generic[A, R]):
    """A verb with what carries it out."""

    def __init__(self, verb: wire.Verb[A, R], run: Callable[[A], R]) -> None:
        self.name = verb.name
        self._verb, self._run = verb, run

    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        try:
            args = self._verb.args.model_validate(raw)
        except ValidationError as error:
            raise ProtocolError(
                f"arguments of {self._verb.name}: {_first(error)}", hint=f"do the versions differ? {UPGRADE}"
            ) from error
        return self._run(args).model_dump(mode="json")


class Service:
    """The verbs, over one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemon: Child | None = None  # that this process started
        self._inbox = Inbox(root)
        self._body = _no_body(0)  # of the request that is served now
        routes: list[Route[Any, Any]] = [
            Route(wire.PING, self.ping),
            Route(wire.HAVE, self.have),
            Route(wire.RECEIVE, self.receive),
            Route(wire.COMMIT_DATASET, self.commit_dataset),
            Route(wire.GC, self.gc),
            Route(wire.SUBMIT, self.submit),
            Route(wire.STATUS, self.status),
            Route(wire.CANCEL, self.cancel),
            Route(wire.RETRY, self.retry),
            Route(wire.EVENTS, self.events),
            Route(wire.LOGS, self.logs),
            Route(wire.METRICS, self.metrics),
            Route(wire.MODELS, self.models),
            Route(wire.LINEAGE, self.lineage),
            Route(wire.PROMOTE, self.promote),
            Route(wire.ROLLBACK, self.rollback),
            Route(wire.DELETE, self.delete),
            Route(wire.PRUNE, self.prune),
            Route(wire.EXPORT, self.export),
            Route(wire.ARTIFACTS, self.artifacts),
            Route(wire.RUNTIME, self.runtime),
            Route(wire.GPU, self.gpu),
            Route(wire.DATASETS, self.datasets),
            Route(wire.SERVER, self.server),
            Route(wire.DOCTOR, self.doctor),
        ]
        self._routes = {route.name: route for route in routes}

    @cached_property
    def _queue(self) -> Queue:
        return Queue(self.root)

    def close(self) -> None:
        self._inbox.close()
        if "_queue" in vars(self):
            self._queue.close()

    def answer(self, line: bytes | None, open_body: Callable[[int], RequestBody] = _no_body) -> wire.Reply:
        """The reply to one line. Never raises for what is in it: this is the one place where errors become replies.

        Args:
            open_body: gives the bytes that follow the line, of which it is told the number.
        """
        reply = self._answer(line, open_body)
        if reply.error is not None:
            note_refusal(self.root, reply.error.code, reply.error.message)
        return reply

    def _answer(self, line: bytes | None, open_body: Callable[[int], RequestBody]) -> wire.Reply:
        try:
            with translate_os_errors(self.root):
                request = _parse(line)
                self._body = open_body(request.body_bytes)
                try:
                    return wire.Reply(result=self._route(request))
                finally:
                    self._body.drain()
        except HafsError as error:
            return _refusal(type(error), str(error), error.hint)
        except ModuleNotFoundError as error:
            return _refusal(MissingExtra, f"the node lacks the package {error.name}", 'install "hafs[node]" there')
        except Exception as error:  # a bug of ours: said to the laptop, and in full to stderr
            traceback.print_exc()
            return _refusal(
                NodeError, f"the node failed: {type(error).__name__}: {error}", "this is a bug in hafs; please report it"
            )

    def _route(self, request: wire.Request) -> dict[str, Any]:
        if request.version > wire.PROTOCOL_VERSION:
            what = f"the laptop speaks protocol {request.version}, this node {wire.PROTOCOL_VERSION}"
            raise ProtocolError(what, hint=UPGRADE)
        if request.verb not in self._routes:
            raise ProtocolError(f"this node (hafs {hafs_version()}) does not know the verb {request.verb[:40]!r}", hint=UPGRADE)
        return self._routes[request.verb](request.args)

    def ping(self, _: wire.Nothing) -> wire.Pong:
        running = daemon_pid(self.root) is not None
        return wire.Pong(
            hafs=hafs_version(), protocol=wire.PROTOCOL_VERSION, root=str(self.root), daemon=running, platform=sys.platform
        )

    def have(self, args: wire.HaveArgs) -> wire.HaveResult:
        return wire.HaveResult(segments=[self._inbox.have(segment) for segment in args.segments])

    def receive(self, args: wire.ReceiveArgs) -> wire.SegmentStatus:
        return self._inbox.receive(args.segment, args.offset, self._body)

    def commit_dataset(self, args: wire.CommitDatasetArgs) -> wire.DatasetResult:
        return self._inbox.commit_dataset(args.manifest)

    def gc(self, args: wire.GcArgs) -> wire.GcResult:
        from trainer_node.gc import collect

        return wire.GcResult(garbage=collect(self.root, self._queue.all(), dry_run=args.dry_run))

    def submit(self, args: wire.SubmitArgs) -> wire.SubmitResult:
        """Queue the job once, then see to it that a daemon is there: one that comes to leave looks at the queue a last time."""
        self._inbox.require_dataset(args.job)
        job, new = self._queue.submit(args.job, self._write_job)
        self._wake()
        return wire.SubmitResult(job=job, new=new)

    def status(self, args: wire.JobArgs) -> wire.JobsResult:
        """Also starts a daemon if work is owed: after a reboot, the first who asks brings the queue back to life."""
        self._wake()
        return wire.JobsResult(jobs=[self._queue.resolve(args.job)] if args.job else self._queue.all())

    def cancel(self, args: wire.JobArgs) -> wire.JobsResult:
        if not args.job:
            raise JobNotFound("cancel which job?", hint="name one: hafs train status lists them")
        job = self._queue.resolve(args.job)
        self._queue.intend_cancel(job.id)
        self._wake()
        return wire.JobsResult(jobs=[self._queue.get(job.id)])

    def retry(self, args: wire.JobArgs) -> wire.JobsResult:
        if not args.job:
            raise JobNotFound("try which job again?", hint="name one: hafs train status lists them")
        job = self._queue.retry(self._queue.resolve(args.job).id)
        self._wake()
        return wire.JobsResult(jobs=[job])

    def events(self, args: wire.EventsArgs) -> wire.EventsResult:
        return read_events(self._queue, args)

    def logs(self, args: wire.ReadArgs) -> wire.ReadResult:
        return read_log(self._queue, self.root, args)

    def metrics(self, args: wire.ReadArgs) -> wire.ReadResult:
        return read_metrics(self._queue, self.root, args)

    def models(self, _: wire.Nothing) -> wire.ModelsResult:
        from trainer_node.aliases import listing

        return listing(self.root)

    def lineage(self, args: wire.ModelArgs) -> wire.LineageResult:
        from trainer_node.ancestry import chain

        return wire.LineageResult(chain=chain(self.root, args.model))

    def promote(self, args: wire.ModelArgs) -> wire.ModelsChanged:
        from trainer_node.aliases import promote

        with self._server() as api:
            return promote(api, self.root, args.model)

    def rollback(self, args: wire.RollbackArgs) -> wire.ModelsChanged:
        from trainer_node.aliases import rollback

        with self._server() as api:
            return rollback(api, self.root, args.model, args.leave)

    def delete(self, args: wire.ModelArgs) -> wire.ModelsChanged:
        from trainer_node.aliases import delete

        with self._server() as api:
            return delete(api, self.root, args.model, self._queue.owed())

    def prune(self, args: wire.PruneArgs) -> wire.ModelsChanged:
        from trainer_node.aliases import prune

        with self._server() as api:
            return prune(api, self.root, args.keep, args.name, self._queue.owed(), dry_run=args.dry_run)

    def export(self, args: wire.ExportArgs) -> wire.ExportState:
        from trainer_node.export.request import ask

        return ask(self.root, args)

    def artifacts(self, args: wire.ArtifactsArgs) -> wire.ArtifactsResult:
        from trainer_node.registry import resolve

        model = resolve(self.root, args.model, failed=True)
        return wire.ArtifactsResult(tag=model.tag, job=model.job, files=list_artifacts(self.root / model.folder))

    def runtime(self, args: wire.RuntimeArgs) -> wire.RuntimeResult:
        from trainer_node.base_model import base_sha256, base_tag, resolve_base, served_gguf
        from trainer_node.runtime.launch import ensure_runtime

        path = resolve_base(args.gguf) if args.gguf else None  # first: nothing is started for a file that is not there
        info, model = ensure_runtime(self.root) if path else self._models_server(), args.model
        if path is not None:
            from trainer_node.ollama import OllamaApi, register_gguf

            sha256 = base_sha256(path)
            served = served_gguf(path, sha256, self.root / "cache" / "bases", lambda done, total: None)
            model = model or base_tag(sha256)
            with OllamaApi(info.url) as api:
                register_gguf(api, model, served)
        return wire.RuntimeResult(url=info.url, model=model, embedded=info.embedded, version=info.version, started=info.started)

    def datasets(self, _: wire.Nothing) -> wire.DatasetsResult:
        from trainer_node.holdings import datasets

        return wire.DatasetsResult(datasets=datasets(self.root))

    def server(self, _: wire.Nothing) -> wire.ServerResult:
        from trainer_node.runtime.launch import find_server, loaded_models

        found = find_server(self.root)
        if found is None:
            return wire.ServerResult()
        loaded = loaded_models(found.url)
        return wire.ServerResult(url=found.url, embedded=found.embedded, version=found.version, loaded=loaded)

    def gpu(self, _: wire.Nothing) -> wire.GpuResult:
        from trainer_node.gpu import look

        return look(self.root)

    def doctor(self, args: wire.DoctorArgs) -> wire.DoctorResult:
        from trainer_node.doctor import examine

        return wire.DoctorResult(checks=[wire.DoctorCheck(**check._asdict()) for check in examine(self.root, args.time)])

    def _models_server(self) -> "RuntimeInfo":
        """The server that has the node's models, started if it is hafs's own. Raises ProviderUnavailable."""
        from trainer_node.aliases import at_ollama, server_of
        from trainer_node.registry import records

        return server_of(self.root, ollama=at_ollama(records(self.root)))

    def _server(self) -> "OllamaApi":
        """A client of the server that has the node's models."""
        from trainer_node.ollama import OllamaApi

        return OllamaApi(self._models_server().url)

    def _write_job(self, id_: str, job: TrainJob) -> None:
        JobDir(self.root / "jobs" / id_).write_job(job)

    def _wake(self) -> None:
        """Start a daemon if something is owed and none is there, nor on its way.

        Two at once, of two connections, are no harm: the second finds the lock held.
        """
        on_its_way = self._daemon is not None and self._daemon.poll() is None
        if not on_its_way and self._queue.owed() and daemon_pid(self.root) is None:
            argv = [sys.executable, "-P", "-m", "trainer_node.cli", "daemon", "--root", str(self.root)]
            with around("daemon.start"):
                argv += ["--idle-exit", str(DAEMON_IDLE_EXIT_S)]
                self._daemon = start_detached(argv, cwd=self.root, log=log_file(self.root))


def list_artifacts(folder: Path) -> list[wire.Artifact]:
    """The files below `folder` with size and hash; hidden and half-written ones, and links that lead elsewhere, are left out."""
    inside = folder.resolve()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve().is_relative_to(inside)]
    return [_artifact(folder, path) for path in files if not any(map(_in_the_making, path.relative_to(folder).parts))]


def _in_the_making(part: str) -> bool:
    return part.startswith(".") or part.endswith(".partial")


def hafs_version() -> str:
    try:
        return version("hafs")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _artifact(folder: Path, path: Path) -> wire.Artifact:
    name = path.relative_to(folder).as_posix()
    return wire.Artifact(name=name, path=path.as_posix(), bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(line: bytes | None) -> wire.Request:
    if line is None:
        raise ProtocolError(f"a line of more than {wire.MAX_LINE_BYTES} bytes", hint="send less at a time")
    try:
        return wire.Request.model_validate_json(line)
    except ValidationError as error:
        raise ProtocolError(f"not a request: {_first(error)}", hint="one JSON object a line, with a verb") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _refusal(kind: type[HafsError], message: str, hint: str) -> wire.Reply:
    return wire.Reply(error=JobError(code=kind.__name__, message=message, hint=hint))
