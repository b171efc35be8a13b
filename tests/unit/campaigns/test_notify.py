"""A campaign tells of its end: a real command, a real webhook, and neither can harm it."""

import json
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from aiohttp import web

from campaigns import notify as module
from campaigns.notify import JobNotice, Notice, job_notify, notice_of, notice_of_job, notify
from campaigns.spec import NotifySpec
from campaigns.status import CampaignEnd, Progress
from campaigns.store import CampaignFiles
from campaigns.sync.jobs import JobRecord
from config.contracts.job import JobError, JobResult, JobSpec, JobState, JobView, TrainJob
from config.errors import ConfigError, HafsError, ProviderUnavailable
from config.settings import Settings
from tests.fakes.campaign_rows import call, spec

KEEP = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"


def notice(end: CampaignEnd | HafsError) -> Notice:
    progress = Progress(spec(budget={"max_usd": 2.0}))
    progress.count(call(0))
    return notice_of(end, progress)


DONE = notice(CampaignEnd("done", "9 of 9 samples", 9, 9, 0.5))


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hafs.campaign")


def test_every_end_has_its_occasion() -> None:
    assert (DONE.occasion, DONE.accepted, DONE.target, DONE.cost_usd, DONE.max_usd) == ("end", 1, 9, 0.5, 2.0)
    assert notice(CampaignEnd("budget", "met", 1, 1, 0.5)).occasion == "budget"
    assert notice(CampaignEnd("exhausted", "no cell", 1, 1, 0.5)).occasion == "failure"
    failed = notice(ProviderUnavailable("nobody answers", hint="start it"))
    assert (failed.occasion, failed.text, failed.hint) == ("failure", "nobody answers", "start it")


def test_a_command_gets_the_message_as_its_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = tmp_path / "a file; with $HOME"  # no shell reads it
    anyio.run(notify, NotifySpec(command=[sys.executable, "-c", KEEP, str(kept)]), DONE)
    assert Notice.model_validate_json(kept.read_text()) == DONE
    assert "was told" in caplog.text


def test_who_wants_failures_is_not_told_of_a_good_end_and_who_wants_ends_is_told_of_all(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    command = [sys.executable, "-c", KEEP, str(kept)]
    anyio.run(notify, NotifySpec(command=command, on=["failure"]), DONE)
    assert not kept.exists()
    failed = notice(ProviderUnavailable("nobody answers"))
    anyio.run(notify, NotifySpec(command=command, on=["end"]), failed)
    assert json.loads(kept.read_text())["occasion"] == "failure"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([sys.executable, "-c", "import sys; sys.exit('no such user')"], "exit code 1: no such user"),
        (["/no/such/program"], "it cannot be started: No such file"),
    ],
)
def test_a_command_that_fails_is_logged(command: list[str], said: str, caplog: pytest.LogCaptureFixture) -> None:
    anyio.run(notify, NotifySpec(command=command), DONE)
    assert said in caplog.text


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    anyio.run(notify, NotifySpec(command=[sys.executable, "-c", "import time; time.sleep(600)"]), DONE)
    assert "it took too long" in caplog.text


async def with_server(handler: Callable[[web.Request], Awaitable[web.Response]], run: Callable[[str], Awaitable[None]]) -> None:
    app = web.Application()
    app.router.add_post("/hook/{secret}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        await run(f"http://127.0.0.1:{runner.addresses[0][1]}/hook/s3cret")
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [200, 500])
def test_a_webhook_gets_json_and_its_address_stays_out_of_the_log(status: int, caplog: pytest.LogCaptureFixture) -> None:
    got: list[Notice] = []

    async def hook(request: web.Request) -> web.Response:
        assert request.content_type == "application/json"
        got.append(Notice.model_validate_json(await request.read()))
        return web.Response(status=status)

    async def run() -> None:
        await with_server(hook, lambda url: notify(NotifySpec(url=url), DONE))

    anyio.run(run)
    assert got == [DONE]
    own = [record.getMessage() for record in caplog.records if record.name == "hafs.campaign"]
    assert own == [f"notify webhook at 127.0.0.1 {'was told' if status == 200 else 'failed: HTTP status 500'}"]


def test_a_webhook_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)

    async def hook(_: web.Request) -> web.Response:
        await anyio.sleep(600)
        return web.Response()

    async def run() -> None:
        await with_server(hook, lambda url: notify(NotifySpec(url=url), DONE))

    anyio.run(run)
    assert "it took too long" in caplog.text


def test_a_webhook_that_is_not_there_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    anyio.run(notify, NotifySpec(url="http://127.0.0.1:9/s3cret"), DONE)
    assert "webhook at 127.0.0.1 failed: cannot connect" in caplog.text
    assert "s3cret" not in caplog.text


def job(state: JobState, error: JobError | None = None, result: JobResult | None = None) -> JobView:
    return JobView(
        id="sft-0001-abcd", kind="sft", name="coder", state=state, created_at=0, updated_at=0, error=error, result=result
    )


def test_a_job_tells_of_its_end(tmp_path: Path) -> None:
    failed = notice_of_job(job(JobState.FAILED, JobError(code="JobFailed", message="no memory", hint="a smaller batch")), "box")
    assert (failed.occasion, failed.state, failed.hint) == ("failure", "FAILED", "a smaller batch")
    assert failed.text == "coder: job sft-0001-abcd on box failed: no memory"
    done = notice_of_job(job(JobState.SUCCEEDED, result=JobResult(model="coder:v2")), "box")
    assert (done.occasion, done.text) == ("end", "coder: job sft-0001-abcd on box succeeded: registered coder:v2")
    kept = tmp_path / "kept"
    anyio.run(notify, NotifySpec(command=[sys.executable, "-c", KEEP, str(kept)], on=["failure"]), failed)
    assert JobNotice.model_validate_json(kept.read_text()) == failed


def test_who_is_told_of_a_job(home: Path) -> None:
    settings = Settings(home=home)
    assert job_notify(settings, "sft-0001-abcd") == NotifySpec()
    files = CampaignFiles(settings, "x")
    files.path.mkdir(parents=True)
    files.spec.write_text(json.dumps({"spec": spec(notify={"command": ["of-the-campaign"]}).model_dump(mode="json")}))
    train_job = TrainJob(
        spec=JobSpec(kind="sft", name="coder", base="package:none", data=["gone", "x"]),
        dataset_id="d",
        code_version="1",
        nonce="n",
    )
    record = JobRecord(key=train_job.key, node="box", job=train_job, job_id="sft-0001-abcd", created_at=0)
    settings.jobs.mkdir()
    (settings.jobs / "one.json").write_text(record.model_dump_json())
    assert job_notify(settings, "sft-0001-abcd").command == ["of-the-campaign"]
    assert job_notify(settings, "sft-0002-abcd") == NotifySpec(), "submitted by another laptop"
    settings.notify_file.write_text('[notify]\ncommand = ["mine"]\n')
    assert job_notify(settings, "sft-0001-abcd").command == ["mine"]
    settings.notify_file.write_text('[notify]\nurll = "x"\n')
    with pytest.raises(ConfigError, match="urll"):
        job_notify(settings, "sft-0001-abcd")
