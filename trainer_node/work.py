"""Work: what the stages of a job share, and how they say what they do. Each part is made when it is first needed.

What a stage says is in stage.json, where the daemon finds it, so `hafs train status` shows it and each new text is an event. What
is waited for is waited for without end; the stop file ends any waiting and any fetching.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_result, wait_exponential

from config.contracts.base_name import HUB, hub_file
from config.contracts.job import JobState
from config.errors import JobCancelled, JobFailed
from config.files import write_atomic
from trainer_node import dataset, hub, registry
from trainer_node.aliases import server_of
from trainer_node.base_model import resolve_base, served_gguf
from trainer_node.jobdir import JobDir, Stage
from trainer_node.ollama import OllamaApi
from trainer_node.train.base import BaseModel, load_model, load_tokenizer, read_base, special_tokens
from trainer_node.train.encode import encode

if TYPE_CHECKING:  # torch is loaded by the stages that need it
    from trainer_node.train.device import Device

TELL_AFTER_S = 2.0  # a wait that is over by then is none worth telling
TELL_EVERY_S = 30.0  # from then on: figures change all the time
PROGRESS_EVERY_S = 1.0  # of what takes minutes

log = logging.getLogger("hafs")


class Work:
    """What the stages share; each part is made when it is first needed, so a retry loads only what is left to do."""

    def __init__(self, job_dir: JobDir, attempt: int, *, offline: bool = False) -> None:
        self.dir, self.root = job_dir, job_dir.root
        self.attempt, self._offline = attempt, offline
        self._stage = Stage(state=JobState.PREPARING)
        self._told_at = 0.0
        self.job = job_dir.job()
        self.spec = self.job.spec
        self.stats_file = job_dir.path / "training_stats.json"
        self.evaluation_file = job_dir.path / "evaluation.json"
        self.probes_file = job_dir.path / "probes.json"
        self.export_file = job_dir.path / "export.json"
        self.server_file = job_dir.path / "server"

    def enter(self, state: JobState, detail: str) -> None:
        """A stage begins. What `detail` says is what a person reads beside the job's state."""
        self._stage = Stage(state=state, detail=detail)
        self.dir.write_stage(self.attempt, self._stage)

    def say(self, detail: str) -> None:
        """What the stage does now; each new text is an event of the job."""
        if detail != self._stage.detail:
            self.enter(self._stage.state, detail)

    def require_going(self) -> None:
        """Raises JobCancelled where the stop file is there."""
        if self.dir.stop_file.exists():
            raise JobCancelled(f"stopped in {self._stage.state}")

    def wait_for(self, look: Callable[[], str]) -> None:
        """Until `look` returns "": until then it names what is waited for, for however long. Raises JobCancelled."""
        tell_at = time.monotonic() + TELL_AFTER_S

        def waiting() -> bool:
            nonlocal tell_at
            self.require_going()
            missing = look()
            if missing and time.monotonic() >= tell_at:
                tell_at = time.monotonic() + TELL_EVERY_S
                log.info("waits for %s", missing)
                self.say(f"waits for {missing}")
            return bool(missing)

        Retrying(retry=retry_if_result(bool), wait=wait_exponential(multiplier=0.05, max=1.0))(waiting)
        self.say("")

    @cached_property
    def base(self) -> BaseModel:
        named = self.spec.base
        return read_base(self._from_hub(named) if named.startswith(HUB) else resolve_base(named))

    def progress(self, step: str, done: int, total: int) -> None:
        """What takes minutes, now and then, in bytes. Raises JobCancelled."""
        self._tell(f"{step}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    def progress_rows(self, step: str, done: int, total: int) -> None:
        """The same in rows."""
        self._tell(f"{step}: {done:,} of {total:,} rows")

    def _tell(self, detail: str) -> None:
        self.require_going()
        if time.monotonic() - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = time.monotonic()
            self.say(detail)

    @cached_property
    def base_gguf(self) -> Path:
        """The base as a model server takes it: the file itself, or a GGUF that is made once of a Hugging Face folder."""
        told = partial(self.progress, "converting the base")
        found = served_gguf(self.base.path, self.base.sha256, self.root / "cache" / "bases", told)
        self.say("")
        return found

    def _from_hub(self, named: str) -> Path:
        """The base as this job knows it since its first attempt, fetched unless it is here."""

        def told(done: int, total: int) -> None:
            self.progress(f"fetching {file.file or file.repo}", done, total)

        pinned = self.dir.base()
        file = hub_file(pinned) if pinned else hub.pin(hub_file(named), offline=self._offline)
        if not pinned:
            self.dir.write_base(str(file))
        found = hub.cached(file)
        if found is None:
            log.info("fetching %s", file)
            found = hub.fetch(file, told, self.wait_for, offline=self._offline)
            self.say("")
        log.info("base: %s", file)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def special(self) -> list[str]:
        return special_tokens(self.tokenizer)

    @cached_property
    def data(self) -> dataset.Prepared:
        manifest = dataset.read_manifest(self.root, self.job.dataset_id)
        wanted = "pairs" if self.spec.kind == "dpo" else "samples"
        if manifest.kind != wanted:
            raise JobFailed(
                f"a {self.spec.kind} job trains on {wanted}, {manifest.name} holds {manifest.kind}", hint="name other data"
            )
        total = sum(segment.rows for segment in manifest.segments)
        rows = self._counted(dataset.read_rows(self.root, manifest), total)
        found = dataset.prepare(rows, self.spec, self.special, lambda row: encode(self.tokenizer, row))
        self.say("")
        return found

    def _counted(self, rows: Iterable[dataset.Row], total: int) -> Iterator[dataset.Row]:
        for done, row in enumerate(rows):
            self.progress_rows("tokenizing", done, total)
            yield row

    @cached_property
    def start(self) -> registry.ModelRecord | None:
        """The model a dpo job goes on from, the same in every attempt. Raises JobFailed if it was trained on another base."""
        if not self.spec.start:
            return None
        pinned = registry.pinned_start(self.dir.path)
        record = registry.resolve(self.root, pinned or self.spec.start)
        if record.base_sha256 != self.base.sha256:
            raise JobFailed(
                f"{record.tag} was trained on {record.base}, which is not the file that base = {self.spec.base!r} is now",
                hint="use the base of the model that the job starts from",
            )
        if not pinned:
            self.dir.require_lease()
            registry.pin_start(self.dir.path, record.tag)
        return record

    @cached_property
    def device(self) -> "Device":
        from trainer_node.train.device import probe

        longest = max(row.longest for row in self.data.train)
        return probe(self.spec.train.batch * longest, self.base.hidden, self.base.feed_forward, self.spec.train.dtype)

    @property
    def server(self) -> str:
        """Of which kind the model server is that this job has met: an Ollama, once one has answered."""
        return registry.OLLAMA if self.server_file.exists() else registry.EMBEDDED

    def connect(self) -> OllamaApi:
        """A client of the model server, asked for anew by each stage: while a model is trained an idle one ends.

        Raises:
            ProviderUnavailable: an Ollama that answered this job is away; a model at another server nobody would look for.
        """
        runtime = server_of(self.root, ollama=self.server == registry.OLLAMA)
        if not runtime.embedded:
            write_atomic(self.server_file, runtime.url.encode())
        else:
            self.server_file.unlink(missing_ok=True)
        log.info("runtime: %s (%s %s)", runtime.url, "embedded" if runtime.embedded else "Ollama", runtime.version)
        return OllamaApi(runtime.url)

    def model(self) -> Any:
        """A fresh copy of the base's weights, ready for an adapter."""
        longest = max(row.longest for row in self.data.train + self.data.held_out)
        return load_model(self.base, self.device.dtype, self.device.kind, longest)

    def start_adapter(self) -> Path:
        assert self.start is not None
        return self.root / self.start.folder / "adapter"
