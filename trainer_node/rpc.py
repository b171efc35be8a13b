"""Serves one connection: one line of ASCII JSON in, one line out, until end of file. Nothing is kept between two lines.

Every whole line gets exactly one reply, whatever is in it; a line that the end of file cuts off is not carried out.
Nothing but replies reaches stdout: what any library prints goes to stderr. A job's state is never changed here.
"""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pydantic import ValidationError

from config.contracts import wire
from config.contracts.base import Tolerant
from config.contracts.job import JobError, TrainJob
from config.errors import HafsError, JobNotFound, MissingExtra, NodeError, ProtocolError, translate_os_errors
from trainer_node.daemon import daemon_pid, log_file
from trainer_node.inbox import Inbox
from trainer_node.jobdir import JobDir
from trainer_node.logs import read_log, read_metrics
from trainer_node.processes import start_detached
from trainer_node.queue import Queue

DAEMON_IDLE_EXIT_S = 900
UPGRADE = 'upgrade hafs on the node: pip install -U "hafs[node,runtime]" on that machine'

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
    try:
        for line in read_requests(requests):
            reply = service.answer(line)
            replies.write(json.dumps(reply.model_dump(mode="json"), separators=(",", ":")).encode("ascii") + b"\n")
            replies.flush()
    finally:
        service.close()


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
                f"arguments of {self._verb.name}: {_first(error)}", hint="upgrade the older of the two sides"
            ) from error
        return self._run(args).model_dump(mode="json")


class Service:
    """The verbs, over one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._inbox = Inbox(root)
        routes: list[Route[Any, Any]] = [
            Route(wire.PING, self.ping),
            Route(wire.HAVE, self.have),
            Route(wire.COMMIT_SEGMENT, self.commit_segment),
            Route(wire.COMMIT_DATASET, self.commit_dataset),
            Route(wire.SUBMIT, self.submit),
            Route(wire.STATUS, self.status),
            Route(wire.CANCEL, self.cancel),
            Route(wire.LOGS, self.logs),
            Route(wire.METRICS, self.metrics),
            Route(wire.MODELS, self.models),
            Route(wire.ARTIFACTS, self.artifacts),
            Route(wire.RUNTIME, self.runtime),
            Route(wire.GPU, self.gpu),
        ]
        self._routes = {route.name: route for route in routes}

    @cached_property
    def _queue(self) -> Queue:
        return Queue(self.root)

    def close(self) -> None:
        if "_queue" in vars(self):
            self._queue.close()

    def answer(self, line: bytes | None) -> wire.Reply:
        """The reply to one line. Never raises for what is in it: this is the one place where errors become replies."""
        try:
            with translate_os_errors(self.root):
                return wire.Reply(result=self._route(_parse(line)))
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

    def commit_segment(self, args: wire.CommitSegmentArgs) -> wire.SegmentStatus:
        return self._inbox.commit_segment(args.segment)

    def commit_dataset(self, args: wire.CommitDatasetArgs) -> wire.DatasetResult:
        return self._inbox.commit_dataset(args.manifest)

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

    def logs(self, args: wire.ReadArgs) -> wire.ReadResult:
        return read_log(self._queue, self.root, args)

    def metrics(self, args: wire.ReadArgs) -> wire.ReadResult:
        return read_metrics(self._queue, self.root, args)

    def models(self, _: wire.Nothing) -> wire.ModelsResult:
        from trainer_node.registry import versions

        return wire.ModelsResult(models=versions(self.root))

    def artifacts(self, args: wire.ArtifactsArgs) -> wire.ArtifactsResult:
        from trainer_node.registry import resolve

        model = resolve(self.root, args.model)
        return wire.ArtifactsResult(tag=model.tag, files=list_artifacts(self.root / model.folder))

    def runtime(self, args: wire.RuntimeArgs) -> wire.RuntimeResult:
        from trainer_node.runtime.launch import ensure_runtime

        info, model = ensure_runtime(self.root), args.model
        if args.gguf:
            from trainer_node.base_model import base_tag, resolve_gguf
            from trainer_node.ollama import OllamaApi, register_gguf

            path = resolve_gguf(args.gguf)
            model = model or base_tag(_sha256(path))
            with OllamaApi(info.url) as api:
                register_gguf(api, model, path)
        return wire.RuntimeResult(url=info.url, model=model, embedded=info.embedded, version=info.version, started=info.started)

    def gpu(self, _: wire.Nothing) -> wire.GpuResult:
        from trainer_node.gpu import look

        return look(self.root)

    def _write_job(self, id_: str, job: TrainJob) -> None:
        JobDir(self.root / "jobs" / id_).write_job(job)

    def _wake(self) -> None:
        """Start a daemon if something is owed and none is there. Two at once are no harm: the second finds the lock held."""
        if self._queue.owed() and daemon_pid(self.root) is None:
            argv = [sys.executable, "-P", "-m", "trainer_node.cli", "daemon", "--root", str(self.root)]
            start_detached([*argv, "--idle-exit", str(DAEMON_IDLE_EXIT_S)], cwd=self.root, log=log_file(self.root))


def list_artifacts(folder: Path) -> list[wire.Artifact]:
    """The files below `folder` with size and hash; hidden ones, and links that lead elsewhere, are left out."""
    inside = folder.resolve()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve().is_relative_to(inside)]
    return [_artifact(folder, path) for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


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
