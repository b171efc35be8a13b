"""Pipeline: the child process of a job. dataset -> train -> evaluate -> export -> register.

    python -P -m trainer_node.pipeline --job <root>/jobs/<id> --attempt N

Each stage leaves its files, whole or not at all, and is skipped where they are there: the next attempt of a job goes on where the
last one stopped, and repeats no training for the sake of a registration. Exit codes: 0 with result.json; 75 after the stop file;
76 where the model server or the hub is away, the disk full or the registry held, which is worth another attempt; anything else
ends the job. What is waited for is told in attempts/N/stage.json, a failure in error.json. It writes into its job's folder, the
registry, models/, cache/bases/ and the hub's cache, nothing else.
"""

import argparse
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from config.contracts.job import JobError, JobState
from config.contracts.sample import Message
from config.errors import DiskFull, HafsError, JobCancelled, JobFailed, ProviderUnavailable, StoreError, StoreHeld
from config.files import write_atomic
from trainer_node import dataset, hub, registry
from trainer_node.hand_over import in_the_way, watched
from trainer_node.jobdir import STOPPED, TRY_AGAIN, JobDir
from trainer_node.ollama import register_gguf
from trainer_node.work import Work

if TYPE_CHECKING:  # loads torch
    from trainer_node.evaluate import Evaluation
    from trainer_node.export.register import Exported

PASSING = (ProviderUnavailable, DiskFull, StoreHeld)  # failures that another attempt may not meet
FULL_BYTES = 2**20  # a disk with less free is full
MEASURE_MB = 1024  # of a GPU: its driver's own, and the products that are measured before the plan says what training needs
ENVIRONMENT = {
    # Base and data are files of this node (trainer_node/hub.py brings a base of the hub): no library looks anything up elsewhere.
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    # The log is read by a person while it grows: no progress bars, no chatter of the libraries.
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads of OpenMP sleep while they wait. Spinning, a step took 25 s instead of 2 s beside other work on the same cores.
    "OMP_WAIT_POLICY": "PASSIVE",
}
QUIET = ("accelerate", "gguf", "httpx", "httpcore")

log = logging.getLogger("hafs")


def prepare(work: Work) -> None:
    """Read and check everything, tell the plan, and make sure that training and serving agree on tokens."""
    from trainer_node.train.agreement import require_agreement
    from trainer_node.train.plan import make_plan, plan_lines, require_context, require_room

    rank = work.spec.lora.rank
    if work.start is not None:
        rank = int(json.loads((work.start_adapter() / "adapter_config.json").read_bytes())["r"])
        log.info("goes on from %s: its adapter has rank %d", work.start.tag, rank)
    data = work.data  # first: its base may have to be fetched, and so long the GPU can serve others
    work.wait_for(lambda: in_the_way(work.root, MEASURE_MB))
    registers = _will_register(work)
    plan = make_plan(work.spec, work.base, data, rank, work.device, work.root, registers)
    write_atomic(work.dir.path / "plan.json", plan.model_dump_json(indent=1).encode())
    for line in plan_lines(plan):
        log.info(line)
    require_context(plan, work.base)
    require_room(plan)
    with work.connect() as api:
        register_gguf(api, work.base.tag, work.base_gguf, partial(work.progress, "uploading the base"))
        work.say("")
        log.info(require_agreement(api, work.base.tag, data.train, partial(work.progress_rows, "comparing tokens")))
        work.say("")
    needed_mb = plan.memory_mb if work.device.kind == "cuda" else 0.0
    work.wait_for(lambda: in_the_way(work.root, needed_mb))


def train(work: Work) -> None:
    from trainer_node.train.dpo import train_dpo
    from trainer_node.train.sft import train_sft

    rows, spec = work.data.train, work.spec
    with watched(work.root, work.say):
        base = work.model()
        if work.start is None:
            stats = train_sft(base, work.tokenizer, rows, spec, work.dir, work.device)
        else:
            stats = train_dpo(base, work.start_adapter(), work.tokenizer, rows, spec, work.dir, work.device)
    log.info("trained %d steps in %.0f s, loss %.3f -> %.3f", stats.steps, stats.train_s, stats.first_loss, stats.last_loss)


def evaluate(work: Work) -> None:
    from peft import PeftModel

    from trainer_node.evaluate import REFERENCE
    from trainer_node.evaluate import evaluate as score
    from trainer_node.export import probes

    model = PeftModel.from_pretrained(work.model(), work.dir.adapter)
    if work.start is not None:
        model.load_adapter(work.start_adapter(), REFERENCE)
    beta = work.spec.dpo.beta if work.start is not None else None
    found = score(model, work.data.held_out, work.tokenizer.pad_token_id, work.spec.train.batch, beta)
    if not math.isfinite(found.perplexity.tuned):
        hint = "the training has diverged: lower train.lr, or look for broken rows"
        raise JobFailed(f"the trained model's held-out perplexity is {found.perplexity.tuned}", hint=hint)
    plain = [row.row.messages for row in work.data.held_out if not row.quotes]  # in what they make of those, servers differ
    asked = [_probe(work), *plain[: probes.OTHERS]]
    noted = probes.Probes(probes=[probes.ask(model, work.tokenizer, each) for each in asked], special=work.special)
    write_atomic(work.probes_file, noted.model_dump_json(indent=1).encode())
    write_atomic(work.evaluation_file, found.model_dump_json(indent=1).encode())
    log.info("held out: perplexity %.2f (base) -> %.2f (tuned)", found.perplexity.base, found.perplexity.tuned)
    if found.pairs is not None:
        log.info(
            "held-out pairs: reward accuracy %.2f, chosen likelier %.2f -> %.2f",
            found.pairs.reward_accuracy,
            found.pairs.chosen_likelier_reference,
            found.pairs.chosen_likelier,
        )


def export(work: Work) -> None:
    from trainer_node.export.forms import make_form, wanted_form

    route, kind = wanted_form(work.spec.export, work.base.path)
    made = make_form(route, kind, base=work.base.path, adapter=work.dir.adapter, folder=work.dir.path, say=work.progress)
    write_atomic(work.export_file, made.model_dump_json(indent=1).encode())
    work.say("")
    what = f", weights in {made.quantized}" if made.quantized else ""
    log.info("%s: %.1f MB%s", made.file, (work.dir.path / made.file).stat().st_size / 2**20, what)


def register(work: Work) -> None:
    from trainer_node.evaluate import Evaluation
    from trainer_node.export import register as registering
    from trainer_node.export.probes import Probes
    from trainer_node.train.loop import TrainingStats

    found = Evaluation.model_validate_json(work.evaluation_file.read_bytes())
    stats = TrainingStats.model_validate_json(work.stats_file.read_bytes())
    made = registering.Exported.model_validate_json(work.export_file.read_bytes())
    noted = Probes.model_validate_json(work.probes_file.read_bytes())
    draft = _draft(work, found, made)
    with work.connect() as api:
        draft = draft.model_copy(update={"server": work.server})
        told = partial(work.progress, "uploading")
        record = registering.register(api, draft, made, work.base_gguf, work.base.context, work.spec, work.dir, noted, told)
        record, note = registering.promoted(api, work.root, record, work.spec)
    note = "; ".join(each for each in (made.note, note) if each)
    work.dir.write_result(registering.result_of(record, note, api.url, stats.train_s, stats.steps))


def _draft(work: Work, found: "Evaluation", made: "Exported") -> registry.ModelRecord:
    """What is known of the version before it has a number."""
    weights = work.dir.adapter / "adapter_model.safetensors"
    with weights.open("rb") as file:
        adapter_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return registry.ModelRecord(
        name=work.spec.name,
        version=0,
        size=_size(work),
        kind=work.spec.kind,
        job=work.dir.id,
        base=work.dir.base() or work.spec.base,
        base_sha256=work.base.sha256,
        dataset_id=work.job.dataset_id,
        adapter_sha256=adapter_sha256,
        start=work.start.tag if work.start else "",
        perplexity=found.perplexity,
        pairs=found.pairs,
        route=made.route,
        quantized=made.quantized,
        quantizer=made.quantizer,
    )


def _size(work: Work) -> str:
    return work.spec.export.size or registry.size_label(work.base.parameters)


def _will_register(work: Work) -> str:
    from trainer_node.export.forms import wanted_form

    name, size = work.spec.name, _size(work)
    route, kind = wanted_form(work.spec.export, work.base.path)
    what = "the base and an adapter" if route == "adapter" else f"one GGUF in {kind}"
    version = f"{name}:{size + '-' if size else ''}v<next> ({what})"
    aliases = " and ".join([*([f"{name}:{size}"] if size else []), f"{name}:latest"])
    if work.spec.export.promote == "eval":
        return f"{version}; {aliases} move after the benchmarks, or by hand"
    return f"{version}, and {aliases} as far as hafs made them"


def _probe(work: Work) -> tuple[Message, ...]:
    """The question that the job itself names, as it is trained."""
    asked = dataset.Row("", (Message(role="user", content=work.spec.probe),), ())
    return dataset.with_system(asked, work.spec.system, 0).messages


def trained(work: Work) -> bool:
    from trainer_node.train.checkpoints import is_complete

    return work.stats_file.exists() and is_complete(work.dir.adapter)


STAGES: tuple[tuple[JobState, Callable[[Work], bool], Callable[[Work], None]], ...] = (
    (JobState.PREPARING, trained, prepare),
    (JobState.RUNNING, trained, train),
    (JobState.EVALUATING, lambda work: work.evaluation_file.exists() and work.probes_file.exists(), evaluate),
    (JobState.EXPORTING, lambda work: work.export_file.exists(), export),
    (JobState.REGISTERING, lambda work: work.dir.result_file.exists(), register),
)


def run(job_dir: JobDir, attempt: int, *, offline: bool = False) -> None:
    """Do what is left of the job.

    Raises:
        JobCancelled: the stop file was seen, between two stages or during training.
        HafsError: any failure, in the words of the stage that met it.
    """
    work = Work(job_dir, attempt, offline=offline)
    for state, done, stage in STAGES:
        if job_dir.stop_file.exists():
            raise JobCancelled(f"stopped before {state}")
        skipped = "done in an earlier attempt" if done(work) else ""
        log.info("%s %s", state, skipped)
        work.enter(state, skipped)
        if not skipped:
            stage(work)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer_node.pipeline")
    parser.add_argument("--job", type=Path, required=True, help="the job's folder")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--fence", type=int, default=0, help="of the lease; 0: started by hand")
    options = parser.parse_args(argv)
    offline = hub.offline_wanted(os.environ)
    os.environ.update(ENVIRONMENT)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library about another: nothing a person could do
    job_dir = JobDir(options.job.resolve(), options.fence)
    try:
        run(job_dir, options.attempt, offline=offline)
    except JobCancelled as stopped:
        log.info("%s", stopped)
        return STOPPED
    except Exception as error:  # the last boundary: what no stage foresaw still ends as an error a person can read
        return _fail(job_dir, options.attempt, error if isinstance(error, HafsError) else _unforeseen(job_dir, error))
    return 0


def _unforeseen(job_dir: JobDir, error: Exception) -> HafsError:
    """A full disk has as many names as there are libraries that write; anything else is a failure like no other."""
    log.exception("unexpected")
    message = f"{type(error).__name__}: {error}"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(job_dir.path).free < FULL_BYTES:
        return DiskFull(f"no space left for {job_dir.path}: {message}", hint="free some space on the node")
    hint = "the log of the attempt has the whole traceback; once the cause is mended, submit it again"
    return JobFailed(message, hint=hint)


def _fail(job_dir: JobDir, attempt: int, error: HafsError) -> int:
    """Say why in the log and in error.json; the exit code."""
    told = JobError(code=type(error).__name__, message=str(error), hint=error.hint)
    log.error("%s: %s\n%s", told.code, told.message, told.hint)
    try:
        write_atomic(job_dir.attempt(attempt) / "error.json", told.model_dump_json(indent=1).encode())
    except StoreError as unwritten:  # the disk that is full: the exit code says enough for another attempt
        log.error("%s", unwritten)
    return TRY_AGAIN if isinstance(error, PASSING) else error.exit_code


if __name__ == "__main__":
    sys.exit(main())
