"""Batches against the fake server in this process; every wait is short and nothing is timed."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiohttp import web

from agents.providers.batch import Batch, Pace
from agents.providers.batch_journal import BatchJournal, BatchRecord
from agents.providers.gemini_batch import BatchProvider, LateBill, _request_id
from agents.providers.gemini_jobs import BatchJobs
from agents.task import Completion, Sampling, Usage
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ProviderUnavailable, RateLimited, StoreCorrupt
from tests.fakes.gemini_batches import Server

MODEL = "gemini-2.5-flash"
SYSTEM = Message(role="system", content="Answer briefly.")
HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A server, a journal and a clock; `open` starts a provider as a new process would."""

    def __init__(self, folder: Path) -> None:
        self.server, self.folder, self.clock, self.url = Server(), folder, Clock(), ""

    @asynccontextmanager
    async def open(self, **settings: Any) -> AsyncIterator[BatchProvider]:
        pace: dict[str, Any] = {"gather_s": 0.05, "settle_s": 0.01, "poll_s": (0.001, 0.002), "patience_s": HOUR}
        jobs = BatchJobs(base_url=self.url, api_key="the-key")
        provider = BatchProvider(jobs, self.folder, clock=self.clock, **{**pace, **settings})
        try:
            yield provider
        finally:
            with anyio.CancelScope(shield=True):
                await provider.aclose()

    def records(self) -> list[BatchRecord]:
        return [BatchRecord.model_validate_json(path.read_bytes()) for path in self.folder.glob("*.json")]

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*"))


@pytest.fixture
def bench(tmp_path: Path) -> Callable[[Callable[[Bench], Awaitable[None]]], None]:
    """`bench(work)` runs `work` beside the server."""

    async def run(work: Callable[[Bench], Awaitable[None]]) -> None:
        bench = Bench(tmp_path / "journal")
        app = web.Application()
        app.add_routes(bench.server.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        bench.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            with anyio.fail_after(60):
                await work(bench)
        finally:
            await runner.cleanup()

    return lambda work: anyio.run(run, work)


def prompt(text: str) -> list[Message]:
    return [SYSTEM, Message(role="user", content=text)]


async def ask(provider: BatchProvider, *texts: str) -> dict[str, Completion | Exception]:
    """All at once."""
    ends: dict[str, Completion | Exception] = {}

    async def one(text: str) -> None:
        try:
            ends[text] = await provider.generate(MODEL, prompt(text), Sampling())
        except Exception as error:
            ends[text] = error

    async with anyio.create_task_group() as group:
        for text in texts:
            group.start_soon(one, text)
    return ends


async def until(met: Callable[[], bool]) -> None:
    for _ in iter(met, True):
        await anyio.sleep(0.001)


def polled(bench: Bench) -> bool:
    """The last job has been looked at."""
    return bool(bench.server.jobs and bench.server.jobs[-1].polls)


def texts_of(ends: dict[str, Any]) -> dict[str, str]:
    return {text: end.text for text, end in ends.items()}


def test_requests_travel_together_and_each_gets_its_own_answer(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        texts = [f"question {number}" for number in range(7)]
        async with bench.open() as provider:
            ends = await ask(provider, *texts)
            assert texts_of(ends) == {text: f"on {text}" for text in texts}
            one = ends["question 0"]
            assert isinstance(one, Completion) and one.finish_reason == "stop" and one.model == MODEL
            assert one.usage == Usage(prompt_tokens=20, completion_tokens=3, thinking_tokens=5, cached_tokens=4)
            (job,) = bench.server.jobs
            assert job.display_name.startswith("hafs-") and job.model == MODEL
            for text in texts:
                provider.stored(MODEL, prompt(text), Sampling())
        assert bench.left() == []

    bench(work)


def test_what_a_request_says(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        sampling = Sampling(temperature=0.2, top_p=0.9, max_tokens=40, seed=7, schema='{"type":"object"}')
        bench.server.control.reply = {"candidates": [{"content": {"parts": [{"text": "{}"}]}, "finishReason": "STOP"}]}
        async with bench.open() as provider:
            assert (await provider.generate(MODEL, prompt("a"), sampling)).text == "{}"
        (line,) = bench.server.jobs[0].lines
        assert line["request"]["contents"] == [{"role": "user", "parts": [{"text": "a"}]}]
        assert line["request"]["systemInstruction"] == {"parts": [{"text": "Answer briefly."}]}
        config = line["request"]["generationConfig"]
        assert (config["temperature"], config["topP"], config["maxOutputTokens"], config["seed"]) == (0.2, 0.9, 40, 7)
        assert (config["responseMimeType"], config["responseJsonSchema"]) == ("application/json", {"type": "object"})
        assert config["thinkingConfig"] == {"thinkingBudget": 0}
        assert set(config) == {
            *("temperature", "topP", "maxOutputTokens", "seed", "responseMimeType", "responseJsonSchema", "thinkingConfig")
        }

    bench(work)


def test_a_full_batch_goes_at_once_and_models_do_not_mix(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        async with bench.open(most=3, gather_s=0.1) as provider, anyio.create_task_group() as group:
            group.start_soon(ask, provider, *"abcdefg")
            await provider.generate("gemini-2.5-pro", prompt("a"), Sampling())
        sizes = sorted((job.model, len(job.lines)) for job in bench.server.jobs)
        assert sizes == [(MODEL, 1), (MODEL, 3), (MODEL, 3), ("gemini-2.5-pro", 1)]

    bench(work)


def test_a_batch_stays_open_while_requests_join(virtual: Any, tmp_path: Path) -> None:
    async def work() -> None:
        record = BatchRecord(display_name="hafs-1", model=MODEL, created_at=0.0, requests=[])
        pace = Pace(HOUR, 1.0, (1.0, 1.0), anyio.current_time)
        batch = Batch(record, BatchJobs(api_key="the-key"), BatchJournal(tmp_path), pace, gathering=True)
        async with anyio.create_task_group() as group:
            group.start_soon(batch._gather, 5.0)
            for key, pause_s in (("a", 4.0), ("b", 4.0), ("c", 4.9)):
                batch.join(key, {}, 1000)
                await anyio.sleep(pause_s)
                assert batch.gathering
            await anyio.sleep(0.2)
            assert not batch.gathering
        assert (batch.record.requests, batch.record.created_at) == (["a", "b", "c"], 13.0)

    virtual(work)


def test_errors_of_single_requests(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        async with bench.open() as provider:
            ends = await ask(provider, "fine", "wrong", "busy", "lost")
            assert isinstance(ends["fine"], Completion)
            assert isinstance(ends["wrong"], BadRequest)
            for text in ("busy", "lost"):
                error = ends[text]
                assert isinstance(error, ProviderUnavailable) and not error.billable
            provider.stored(MODEL, prompt("fine"), Sampling())
            assert bench.left() == []  # what was not answered was not paid: nothing is kept for it
            await ask(provider, "busy")  # and is sent again
        assert [len(job.lines) for job in bench.server.jobs] == [4, 1]

    bench(work)


def test_an_answer_without_an_end_is_none_and_is_sent_again(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.reply = {"candidates": [{"content": {"parts": [{"text": "half"}]}}]}
        async with bench.open() as provider:
            assert isinstance((await ask(provider, "a"))["a"], ProviderUnavailable)
            bench.server.control.reply = {"candidates": [], "promptFeedback": {"blockReason": "SAFETY"}}
            end = (await ask(provider, "a"))["a"]
            assert isinstance(end, Completion) and (end.finish_reason, end.detail) == ("blocked", "SAFETY")

    bench(work)


@pytest.mark.parametrize("end", ["FAILED", "EXPIRED", "CANCELLED"])
def test_a_batch_that_fails_sends_its_requests_back(bench: Any, end: str) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.end = end
        async with bench.open() as provider:
            for error in (await ask(provider, "a", "b")).values():
                assert isinstance(error, ProviderUnavailable) and not error.billable and end in str(error)
            assert bench.left() == []
            bench.server.control.end = "SUCCEEDED"
            assert texts_of(await ask(provider, "a")) == {"a": "on a"}

    bench(work)


def test_looks_that_fail_are_repeated(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.fail_polls = 3
        async with bench.open() as provider:
            assert texts_of(await ask(provider, "a")) == {"a": "on a"}

    bench(work)


@pytest.mark.parametrize(("fault", "kind"), [("refuse_create", RateLimited), ("refuse_upload", ProviderUnavailable)])
def test_what_was_certainly_not_created_is_told_at_once_and_forgotten(bench: Any, fault: str, kind: type[Exception]) -> None:
    async def work(bench: Bench) -> None:
        setattr(bench.server.control, fault, 1)
        async with bench.open() as provider:
            ends = await ask(provider, "a", "b")
            assert all(type(end) is not ProviderUnavailable or not end.billable for end in ends.values())
            assert all(isinstance(end, kind) for end in ends.values())
            assert ends["a"] is not ends["b"]
            assert bench.left() == []
            assert texts_of(await ask(provider, "a", "b")) == {"a": "on a", "b": "on b"}
        assert len(bench.server.jobs) == 1

    bench(work)


def test_a_lost_answer_to_create_makes_no_second_job(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.drop_create = 1
        bench.server.control.hide = 1  # the list lags
        async with bench.open() as provider:
            assert texts_of(await ask(provider, "a", "b")) == {"a": "on a", "b": "on b"}
        assert list(bench.server.created.values()) == [1]
        assert bench.server.control.hide == 0

    bench(work)


def test_a_refused_key_leaves_a_living_batch_in_the_journal(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.polls = 0
        async with bench.open() as provider:
            with monkeypatch.context() as patch:

                async def refused(name: str) -> None:
                    raise AuthFailed("the key was revoked")

                patch.setattr(provider._jobs, "look", refused)
                assert isinstance((await ask(provider, "a"))["a"], AuthFailed)
        bench.server.control.polls = 1
        async with bench.open() as provider:
            assert texts_of(await ask(provider, "a")) == {"a": "on a"}
        assert bench.server.billed == {"a": 1}

    bench(work)


async def cancelled_after(bench: Bench, met: Callable[[], bool], *texts: str) -> None:
    """A run that asks for these and is cancelled once `met`."""
    async with bench.open() as provider, anyio.create_task_group() as group:
        group.start_soon(ask, provider, *texts)
        await until(met)
        group.cancel_scope.cancel()


def test_cancelled_while_it_is_gathered_a_request_is_not_sent(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        async with bench.open(gather_s=HOUR, most=3) as provider:
            async with anyio.create_task_group() as group:
                for text in ("first", "second"):  # the first one drives
                    group.start_soon(ask, provider, text)
                await until(lambda: len(provider._by_request) == 2)
                group.cancel_scope.cancel()
            assert len(await ask(provider, "third", "fourth", "fifth")) == 3
        assert bench.server.billed == {"third": 1, "fourth": 1, "fifth": 1}

    bench(work)


def test_who_drives_may_be_cancelled(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.polls = 0
        ends: dict[str, Any] = {}

        async def second(provider: BatchProvider) -> None:
            ends.update(await ask(provider, "second"))

        async with bench.open(gather_s=HOUR, most=2) as provider, anyio.create_task_group() as group:
            async with anyio.create_task_group() as first:
                first.start_soon(ask, provider, "first")
                await until(lambda: len(provider._by_request) == 1)
                group.start_soon(second, provider)
                await until(lambda: polled(bench))
                first.cancel_scope.cancel()
            bench.server.control.polls = 1
        assert texts_of(ends) == {"second": "on second"}
        assert [len(job.lines) for job in bench.server.jobs] == [2]

    bench(work)


def test_after_a_restart_requests_attach_to_their_batch(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.polls = 0
        await cancelled_after(bench, lambda: polled(bench), "a", "b")
        assert len(bench.left()) == 1  # the record; what was sent need not be kept
        bench.server.control.polls = 1
        async with bench.open() as provider:
            assert texts_of(await ask(provider, "b", "c")) == {"b": "on b", "c": "on c"}
            provider.stored(MODEL, prompt("b"), Sampling())
        async with bench.open() as provider:  # handed out, and not said to be stored: it is still there
            assert texts_of(await ask(provider, "a", "c")) == {"a": "on a", "c": "on c"}
        assert bench.server.billed == {"a": 1, "b": 1, "c": 1}
        assert sorted(len(record.requests) for record in bench.records()) == [1, 1]

    bench(work)


def test_killed_while_it_was_created(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.hold_create = True
        await cancelled_after(bench, lambda: bool(bench.server.jobs), "a", "b")
        (record,) = bench.records()
        assert not record.job and len(record.requests) == 2
        for number in range(5):  # the list has pages
            bench.server.jobs.append(type(bench.server.jobs[0])(f"batches/other{number}", f"other{number}", MODEL, []))
        bench.server.set(hold_create=False, hide=1)
        async with bench.open() as provider:
            assert texts_of(await ask(provider, "a", "b")) == {"a": "on a", "b": "on b"}
        assert bench.server.created == {record.display_name: 1}

    bench(work)


def test_an_intent_that_never_reached_the_server_is_created_under_its_name(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        async with bench.open() as provider:
            body = provider._jobs.request(MODEL, prompt("a"), Sampling())
        key = _request_id(MODEL, prompt("a"), Sampling())
        record = BatchRecord(display_name="hafs-1", model=MODEL, created_at=bench.clock.now - 2 * HOUR, requests=[key])
        BatchJournal(bench.folder).intend(record, {key: body})
        async with bench.open() as provider:  # older than the patience, which begins with the job
            assert texts_of(await ask(provider, "a")) == {"a": "on a"}
        assert bench.server.created == {"hafs-1": 1}

    bench(work)


async def stalled(bench: Bench, *texts: str) -> None:
    """A run whose batch stalls."""
    bench.server.control.polls = 0
    async with bench.open() as provider, anyio.create_task_group() as group:
        ends: dict[str, Any] = {}

        async def waits() -> None:
            ends.update(await ask(provider, *texts))

        group.start_soon(waits)
        await until(lambda: polled(bench))
        bench.clock.now += HOUR
        await until(lambda: len(ends) == len(texts))
        assert all(isinstance(end, ProviderUnavailable) and not end.billable for end in ends.values())
        assert isinstance((await ask(provider, texts[0]))[texts[0]], ProviderUnavailable)  # it is not sent again
        assert await provider.late_bills() == []
    assert bench.server.jobs[-1].cancelled


def test_a_stalled_batch_that_bills_late_is_reported_until_it_is_written_down(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        await stalled(bench, "a", "b", "wrong")
        for job in bench.server.jobs:
            bench.server.finish(job)
        twice = Usage(prompt_tokens=40, completion_tokens=6, thinking_tokens=10, cached_tokens=8)
        bill = LateBill(bench.server.jobs[0].display_name, MODEL, 2, twice)
        async with bench.open() as provider:
            assert await provider.late_bills() == [bill]
        async with bench.open() as provider:  # it was not written down
            assert await provider.late_bills() == [bill] == await provider.late_bills()
            await provider.billed(bill)
            assert await provider.late_bills() == []
        assert bench.left() == []

    bench(work)


def test_a_late_answer_that_is_asked_for_is_handed_out_and_not_reported(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        await stalled(bench, "a", "b")
        for job in bench.server.jobs:
            bench.server.finish(job)
        async with bench.open() as provider:
            assert texts_of(await ask(provider, "a")) == {"a": "on a"}
            assert [bill.requests for bill in await provider.late_bills()] == [1]
        assert bench.server.billed == {"a": 1, "b": 1}

    bench(work)


def test_a_stalled_batch_that_heeds_its_cancellation_costs_nothing(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.heeds_cancel = True
        await stalled(bench, "a")
        assert bench.left() == []
        assert bench.server.billed == {}

    bench(work)


def test_a_batch_that_is_gone_from_the_server(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        await stalled(bench, "a")
        bench.server.jobs.clear()
        async with bench.open() as provider:
            assert await provider.late_bills() == []
        assert bench.left() == []

    bench(work)


def test_given_up_before_it_is_known_whether_it_was_created(bench: Any) -> None:
    async def work(bench: Bench) -> None:
        bench.server.control.hold_create = True
        await cancelled_after(bench, lambda: bool(bench.server.jobs), "a")
        (record,) = bench.records()
        bench.clock.now += 2 * HOUR
        BatchJournal(bench.folder).write(record.model_copy(update={"abandoned": True}))
        bench.server.set(hold_create=False, polls=1)
        async with bench.open() as provider:
            assert [bill.requests for bill in await provider.late_bills()] == [1]
        bench.server.jobs.clear()
        BatchJournal(bench.folder).write(record.model_copy(update={"abandoned": True}))
        async with bench.open() as provider:
            assert await provider.late_bills() == []
        assert bench.left() == []

    bench(work)


def test_leftovers_of_a_crash_are_removed_and_a_broken_record_is_named(tmp_path: Path) -> None:
    record = BatchRecord(display_name="hafs-1", model=MODEL, created_at=1.0, requests=["k"])
    BatchJournal(tmp_path).intend(record, {"k": {"contents": []}})
    for name in ("hafs-2.requests.jsonl", "hafs-2.answers.jsonl", ".hafs-1.json.abc123"):
        (tmp_path / name).write_text("torn")
    assert BatchJournal(tmp_path).load() == [record]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hafs-1.json", "hafs-1.requests.jsonl"]
    assert json.loads((tmp_path / "hafs-1.requests.jsonl").read_text()) == {"key": "k", "request": {"contents": []}}
    (tmp_path / "hafs-3.json").write_text("{")
    with pytest.raises(StoreCorrupt, match=r"hafs-3\.json"):
        BatchJournal(tmp_path).load()
    (tmp_path / "hafs-3.json").write_text(record.model_dump_json())
    with pytest.raises(StoreCorrupt, match="another batch"):
        BatchJournal(tmp_path).load()
