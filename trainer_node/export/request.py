"""Another form of a version, made on request by a process of its own, which outlives the connection that asked for it.

    <version>/.exports/<route>[-<kind>].json    how far it is, or how it ended
    <version>/.exports/<route>[-<kind>].lock    held by the process that makes it
    <version>/.exports/<route>[-<kind>].log     what it printed

A free lock beside a file that says "running" means: cut off. Whoever asks again starts it again. A form is whole or absent.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_exponential

from config.contracts.job import JobError, TrainJob
from config.contracts.wire import ExportArgs, ExportState
from config.errors import HafsError, JobFailed, translate_os_errors
from config.files import write_atomic
from config.locks import FileLock, holder
from trainer_node import registry
from trainer_node.processes import reap, start_detached
from trainer_node.registry import ModelRecord

if TYPE_CHECKING:
    from trainer_node.export.modelfile import Dress
    from trainer_node.train.base import BaseModel

START_S = 60.0  # a busy machine
TOLD_EVERY_S = 0.5

log = logging.getLogger("hafs")


class Form:
    """Where one form of a version is made."""

    def __init__(self, root: Path, record: ModelRecord, route: str, kind: str) -> None:
        self.root, self.record, self.route, self.kind = root, record, route, kind
        self.folder = root / record.folder
        name = f"{route}-{kind}" if kind else route
        self.file = self.folder / ".exports" / f"{name}.json"
        self.lock = self.file.with_suffix(".lock")
        self.log = self.file.with_suffix(".log")

    def state(self) -> ExportState:
        """How it stands; raises JobFailed where it was cut off, or never begun."""
        running = holder(self.lock) is not None  # first: it writes its last word before it lets go
        try:
            state = ExportState.model_validate_json(self.file.read_bytes())
        except (FileNotFoundError, ValidationError):
            state = ExportState(tag=self.record.tag, state="running", step="starting")
        if state.state == "running" and not running:
            raise JobFailed(f"the export of {self.record.tag} was cut off; its log is {self.log}", hint="run it again")
        return state

    def write(self, state: ExportState) -> None:
        write_atomic(self.file, state.model_dump_json(indent=1).encode())


def ask(root: Path, args: ExportArgs) -> ExportState:
    """Start an export unless it runs or is there, or tell how far it is.

    Raises:
        JobNotFound: no such model.
        JobFailed: it was cut off.
    """
    form = Form(root, registry.resolve(root, args.model, failed=True), args.route, _kind(args))
    if args.start:
        done = _made(form)
        if done is not None:
            return done
        if holder(form.lock) is None:
            _start(form)
    wait = Retrying(
        retry=retry_if_result(lambda state: state.state == "running"),
        wait=wait_exponential(0.05, max=0.5),
        stop=stop_after_delay(args.wait_s),
        retry_error_callback=lambda last: last.outcome.result() if last.outcome else None,
    )
    found: ExportState = wait(form.state)
    return found


def _kind(args: ExportArgs) -> str:
    if args.quantize and args.route != "merged":
        raise JobFailed(f"--quantize does not go with --route {args.route}", hint="quantize a merged GGUF: --route merged")
    return (args.quantize or "F16") if args.route == "merged" else ""


def _made(form: Form) -> ExportState | None:
    """What an earlier export says, if all it made is still there."""
    try:
        state = form.state()
    except JobFailed:
        return None
    there = all((form.folder / name).exists() for name in state.files)
    return state if state.state == "done" and there else None


def _start(form: Form) -> None:
    """Start the process, and wait until it holds the lock or has ended. What an earlier one said counts no more."""
    with translate_os_errors(form.file):
        form.file.unlink(missing_ok=True)
    argv = [sys.executable, "-P", "-m", "trainer_node.export.request", "--root", str(form.root)]
    argv += ["--model", form.record.tag, "--route", form.route, "--quantize", form.kind]
    child = start_detached(argv, cwd=form.root, log=form.log)
    reap(child)
    wait = Retrying(
        retry=retry_if_result(lambda begun: not begun), wait=wait_exponential(0.02, max=0.2), stop=stop_after_delay(START_S)
    )
    try:
        wait(lambda: child.poll() is not None or holder(form.lock) is not None)
    except RetryError as error:
        raise JobFailed(f"the export did not start within {START_S:g} s; its log is {form.log}", hint="try again") from error


def make(form: Form) -> None:
    """Make the form and write how it ended. Nothing is done where another process makes it."""
    lock = FileLock(form.lock)
    if not lock.acquire():
        return
    try:
        form.write(ExportState(tag=form.record.tag, state="running", step="starting"))
        try:
            state = _make(form)
        except HafsError as error:
            told = JobError(code=type(error).__name__, message=str(error), hint=error.hint)
            state = ExportState(tag=form.record.tag, state="failed", error=told)
        form.write(state)
    finally:
        lock.release()


def _make(form: Form) -> ExportState:
    from trainer_node.export.forms import make_form
    from trainer_node.export.register import modelfile_of

    told_at = 0.0

    def say(step: str, done: int, total: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= TOLD_EVERY_S:
            told_at = time.monotonic()
            form.write(ExportState(tag=form.record.tag, state="running", step=step, done=done, total=total))

    base = _base_of(form.record)
    made = make_form(form.route, form.kind, base=base.path, adapter=form.folder / "adapter", folder=form.folder, say=say)
    files = [made.file]
    if form.route != "hf":
        text = modelfile_of(made, form.record, _dress(form.folder, base.context))
        write_atomic(form.folder / made.modelfile, text.encode())
        files.append(made.modelfile)
    figures = {"quantized": made.quantized, "quantizer": made.quantizer, "note": made.note}
    return ExportState(tag=form.record.tag, state="done", files=files, **figures)


def _base_of(record: ModelRecord) -> "BaseModel":
    """The base that a version was trained on. Raises JobFailed where another file has its name now."""
    from trainer_node.base_model import resolve_base
    from trainer_node.train.base import read_base

    base = read_base(resolve_base(record.base))
    if base.sha256 != record.base_sha256:
        raise JobFailed(f"{record.base} is no longer the file that {record.tag} was trained on", hint="put that one back")
    return base


def _dress(folder: Path, context: int) -> "Dress":
    """As the version was registered; one of an older hafs has no note of it."""
    from trainer_node.export.modelfile import Dress
    from trainer_node.export.register import DRESS, TURN_ENDS, served_parameters

    try:
        return Dress.model_validate_json((folder / DRESS).read_bytes())
    except FileNotFoundError:
        spec = TrainJob.model_validate_json((folder / "job.json").read_bytes()).spec
        return Dress(system=spec.system, parameters=served_parameters(spec, TURN_ENDS[:2], context))


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainer_node.export.request")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--route", required=True)
    parser.add_argument("--quantize", default="")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    record = registry.resolve(options.root, options.model, failed=True)
    make(Form(options.root, record, options.route, options.quantize))


if __name__ == "__main__":
    main()
