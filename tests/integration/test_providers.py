"""Providers, and the scheduler over them, against servers on loopback."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from agents.budget import Budget
from agents.lanes import Lane
from agents.prices import price_of
from agents.providers.base import Provider
from agents.providers.gemini import GeminiProvider
from agents.providers.ollama import OllamaProvider
from agents.scheduler import RunEnd, Scheduler
from agents.task import Outcome, Sampling, Task
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ProviderError, ProviderUnavailable, RateLimited

pytestmark = pytest.mark.integration

MOCK = Path(__file__).parents[1] / "fakes" / "mock_models.py"
QUESTION = [Message(role="system", content="Answer in one word."), Message(role="user", content="What is the capital of France?")]


@contextmanager
def mock_models(**environment: str) -> Iterator[str]:
    """The mock as a child process; yields its URL."""
    with subprocess.Popen(
        [sys.executable, "-P", str(MOCK), "0"], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as child:
        try:
            assert child.stdout is not None
            yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.terminate()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "a-key")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)


class Tasks:
    def __init__(self, count: int) -> None:
        self.left = count

    def next(self) -> Task | None:
        if not self.left:
            return None
        self.left -= 1
        message = Message(role="user", content=f"prompt {self.left}")
        return Task("asm", "c", str(self.left), (message,), Sampling(max_tokens=60), 1, 0)


def run(lanes: Callable[[], list[Lane]], count: int, budget: Budget | None = None) -> tuple[RunEnd, list[Outcome]]:
    """Run `count` tasks over lanes that are opened, and closed, inside the event loop."""
    outcomes: list[Outcome] = []

    async def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)

    async def work() -> RunEnd:
        opened = lanes()
        try:
            return await Scheduler(opened, {}, budget or Budget(None)).run(Tasks(count), keep)
        finally:
            for lane in opened:
                await lane.provider.aclose()

    return anyio.run(work), outcomes


def ask(provider: Callable[[], Provider], call: Callable[[Provider], Any]) -> Any:
    async def work() -> Any:
        opened = provider()
        try:
            return await call(opened)
        finally:
            await opened.aclose()

    return anyio.run(work)


async def pieces(provider: Provider) -> list[str]:
    return [piece async for piece in provider.stream("gemini-2.0-flash", QUESTION, Sampling(max_tokens=60))]


def test_both_providers_in_one_run_over_the_mock() -> None:
    with mock_models(LAT="0.02", WORDS="5") as url:
        price = price_of("gemini", "gemini-2.5-flash")
        budget = Budget(1.0)

        def lanes() -> list[Lane]:
            gpu = Lane("gpu", OllamaProvider(url), "mock", 4)
            return [gpu, Lane("flash", GeminiProvider(base_url=url), "gemini-2.5-flash", 4, price=price)]

        end, outcomes = run(lanes, 80, budget)
        stats = httpx.get(f"{url}/stats").json()
    assert end == RunEnd("done", "")
    assert stats["ok"] == stats["unique"] == len(outcomes) == 80 and stats["peak"] <= 8
    assert {outcome.provider for outcome in outcomes} == {"ollama", "gemini"}
    assert all(
        o.completion and o.completion.usage.completion_tokens == 6 and o.completion.finish_reason == "stop" for o in outcomes
    )
    assert 0 < budget.spent_usd == pytest.approx(sum(outcome.cost_usd for outcome in outcomes))


def test_a_server_with_fewer_slots_than_wanted() -> None:
    with mock_models(LAT="0.05", CAP="8", RA="1") as url:
        _, outcomes = run(lambda: [Lane("gpu", OllamaProvider(url), "mock", 32)], 400)
        stats = httpx.get(f"{url}/stats").json()
    assert len(outcomes) == 400 and all(outcome.completion for outcome in outcomes)
    assert stats["peak"] <= 8 and stats["repeated"] == 0
    assert stats["span_s"] < 2 * 400 / 8 * 0.05


def test_a_server_that_fails_now_and_then() -> None:
    with mock_models(LAT="0.01", P429="0.1", P500="0.05", RA="0") as url:
        _, outcomes = run(lambda: [Lane("flash", GeminiProvider(base_url=url), "gemini-2.5-flash", 8)], 100)
    assert len({outcome.task.id for outcome in outcomes}) == len(outcomes) == 100
    assert all(outcome.completion for outcome in outcomes)


@pytest.mark.parametrize(
    "provider", [lambda: OllamaProvider("127.0.0.1:9"), lambda: GeminiProvider(base_url="http://127.0.0.1:9")]
)
def test_nobody_there(provider: Callable[[], Provider]) -> None:
    with pytest.raises(ProviderUnavailable, match=r"cannot connect to .*127.0.0.1:9") as raised:
        ask(provider, lambda p: p.generate("m", QUESTION, Sampling()))
    assert raised.value.hint and not raised.value.billable
    with pytest.raises(ProviderUnavailable):
        ask(provider, lambda p: p.models())


def test_models_of_an_ollama_server() -> None:
    with mock_models(MODELS="a:latest,b:7b") as url:
        assert ask(lambda: OllamaProvider(url), lambda p: p.models()) == ["a:latest", "b:7b"]


# --- Gemini against llmock, which grades the client ------------------------------------------------------------------


def gemini(llmock: Any) -> GeminiProvider:
    return GeminiProvider(base_url=llmock.base_url("gemini"))


def graded_run(llmock: Any, count: int = 4, timeout_s: float = 5.0) -> list[Outcome]:
    _, outcomes = run(lambda: [Lane("flash", gemini(llmock), "gemini-2.0-flash", 2, timeout_s)], count)
    llmock.assert_resilient(strict=True)
    return outcomes


def test_rate_limits_are_waited_for(llmock: Any) -> None:
    llmock.rate_limit(times=2, retry_after=0.5)
    assert all(outcome.completion for outcome in graded_run(llmock))


def test_an_outage_is_backed_off_from(llmock: Any) -> None:
    llmock.fail(503, times=4)
    outcomes = graded_run(llmock, count=1)
    assert outcomes[0].completion and outcomes[0].attempt == 5


def test_what_cannot_succeed_is_not_retried(llmock: Any) -> None:
    llmock.reply("fine").fail(400, times=1)
    outcomes = graded_run(llmock, count=3)
    assert sum(bool(outcome.error) for outcome in outcomes) == 1


@pytest.mark.parametrize(
    ("status", "error"), [(401, AuthFailed), (403, AuthFailed), (404, BadRequest), (429, RateLimited), (500, ProviderUnavailable)]
)
def test_statuses(llmock: Any, status: int, error: type[ProviderError]) -> None:
    llmock.fail(status)
    with pytest.raises(error):
        ask(lambda: gemini(llmock), lambda p: p.generate("gemini-2.0-flash", QUESTION, Sampling()))


def test_retry_after_reaches_the_error(llmock: Any) -> None:
    llmock.rate_limit(retry_after=7)
    with pytest.raises(RateLimited) as raised:
        ask(lambda: gemini(llmock), lambda p: p.generate("gemini-2.0-flash", QUESTION, Sampling()))
    assert raised.value.retry_after_s == 7 and not raised.value.per_day


def test_a_whole_stream(llmock: Any) -> None:
    llmock.reply("Paris is the capital of France, and has been for long.")
    assert "".join(ask(lambda: gemini(llmock), pieces)) == "Paris is the capital of France, and has been for long."


@pytest.mark.parametrize("fault", ["truncate", "disconnect", "corrupt"])
def test_a_broken_stream_is_never_taken_for_whole(llmock: Any, fault: str) -> None:
    getattr(llmock.reply("one two three four five six seven eight"), fault)(after_chunks=2)

    async def twice(provider: Provider) -> str:
        with pytest.raises(ProviderUnavailable) as raised:
            await pieces(provider)
        assert raised.value.billable
        await asyncio.sleep(0.3)  # a caller's pause before its retry, which llmock wants to see
        return "".join(await pieces(provider))

    assert ask(lambda: gemini(llmock), twice)
    llmock.assert_resilient()


def test_a_stalled_answer_is_timed_out_and_asked_again(llmock: Any) -> None:
    llmock.delay(2, times=1)
    outcomes = graded_run(llmock, count=1, timeout_s=0.5)
    assert outcomes[0].completion and outcomes[0].attempt == 2


def test_models_of_gemini(llmock: Any) -> None:
    assert "gemini-2.0-flash" in ask(lambda: gemini(llmock), lambda p: p.models())
