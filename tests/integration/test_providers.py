"""Providers, and the scheduler over them, against servers on loopback that do everything a server can do wrong."""

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from agents.budget import Budget
from agents.lanes import Endpoint, Lane
from agents.prices import price_of
from agents.providers.base import Provider
from agents.providers.gemini import GeminiProvider
from agents.providers.ollama import OllamaProvider
from agents.providers.openai_compatible import OpenAIProvider
from agents.scheduler import RunEnd, Scheduler
from agents.task import Outcome, Sampling, Task
from config.contracts.sample import Message
from config.errors import AuthFailed, BadRequest, ModelMissing, Overloaded, ProviderError, ProviderUnavailable, RateLimited

pytestmark = pytest.mark.integration

MOCK = Path(__file__).parents[1] / "fakes" / "mock_models.py"
QUESTION = [Message(role="system", content="Answer in one word."), Message(role="user", content="What is the capital of France?")]
MODELS = {"ollama": "mock", "gemini": "gemini-2.0-flash", "openai": "gpt-4o-mini"}
OPEN: dict[str, Callable[..., Provider]] = {
    "ollama": lambda url, **more: OllamaProvider(url, **more),
    "gemini": lambda url, **more: GeminiProvider(base_url=url, **more),
    "openai": lambda url, **more: OpenAIProvider(url if url.endswith("/v1") else f"{url}/v1", api_key="a-key", **more),
}
each_provider = pytest.mark.parametrize("name", OPEN)
each_api = pytest.mark.parametrize("api", ["gemini", "openai"])


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

    def next(self, domains: Collection[str]) -> Task | None:
        if not self.left or "asm" not in domains:
            return None
        self.left -= 1
        message = Message(role="user", content=f"prompt {self.left}, about the ways of the world")
        return Task("asm", "c", str(self.left), (message,), Sampling(max_tokens=60), 1, 0)

    def remaining(self) -> int:
        return self.left


def lane(name: str, url: str, *, slots: int = 4, timeout_s: float = 120.0, model: str = "", **settings: Any) -> Lane:
    endpoint = Endpoint(f"{name} {url}", queues=name == "ollama", slots=slots)
    model = model or MODELS[name]
    price = price_of("gemini", model) if name == "gemini" else None
    return Lane(name, OPEN[name](url, **settings), model, endpoint, timeout_s, price, own=name != "gemini")


def run(lanes: Callable[[], list[Lane]], count: int, budget: Budget | None = None) -> tuple[RunEnd, list[Outcome]]:
    """Run `count` tasks over lanes that are opened, and closed, inside the event loop."""
    outcomes: list[Outcome] = []

    async def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)

    async def work() -> RunEnd:
        opened = lanes()
        try:
            routes = {"asm": [each.name for each in opened]}
            return await Scheduler(opened, routes, budget or Budget(None)).run(Tasks(count), keep)
        finally:
            for each in opened:
                await each.provider.aclose()

    end = anyio.run(work)
    assert len({outcome.task.id for outcome in outcomes}) == len(outcomes)
    return end, outcomes


def ask(provider: Callable[[], Provider], call: Callable[[Any], Any]) -> Any:
    async def work() -> Any:
        opened = provider()
        try:
            return await call(opened)
        finally:
            await opened.aclose()

    return anyio.run(work)


def pieces(model: str) -> Callable[[Provider], Any]:
    async def collect(provider: Provider) -> list[str]:
        return [piece async for piece in provider.stream(model, QUESTION, Sampling(max_tokens=60))]

    return collect


# --- the mock --------------------------------------------------------------------------------------------------------


def test_all_providers_in_one_run_over_the_mock() -> None:
    with mock_models(LAT="0.02", WORDS="5") as url:
        budget = Budget(1.0)

        def lanes() -> list[Lane]:
            return [lane("ollama", url), lane("openai", url), lane("gemini", url, model="gemini-2.5-flash")]

        end, outcomes = run(lanes, 80, budget)
        stats = httpx.get(f"{url}/stats").json()
    assert end == RunEnd("done", "")
    assert stats["ok"] == stats["unique"] == len(outcomes) == 80 and stats["peak"] <= 12
    assert {outcome.provider for outcome in outcomes} == {"ollama", "openai", "gemini"}
    assert all(
        o.completion and o.completion.usage.completion_tokens == 6 and o.completion.finish_reason == "stop" for o in outcomes
    )
    assert 0 < budget.spent_usd == pytest.approx(sum(outcome.cost_usd for outcome in outcomes))


@each_provider
def test_a_streamed_answer_is_the_same_as_a_whole_one(name: str) -> None:
    with mock_models(LAT="0.01", WORDS="40") as url:
        whole = ask(lambda: OPEN[name](url), lambda p: p.generate(MODELS[name], QUESTION, Sampling()))
        pieced = ask(lambda: OPEN[name](url, idle_timeout_s=5), lambda p: p.generate(MODELS[name], QUESTION, Sampling()))
        streamed = ask(lambda: OPEN[name](url), pieces(MODELS[name]))
    assert whole.text == pieced.text == "".join(streamed) and len(streamed) > 3
    assert whole.usage == pieced.usage and whole.usage.prompt_tokens and whole.usage.completion_tokens == 41
    assert whole.finish_reason == pieced.finish_reason == "stop"


@each_provider
def test_a_good_teacher_repeats_the_fact(name: str) -> None:
    messages = [QUESTION[0], Message(role="user", content="Fact: LDA loads the accumulator.\nSay it.")]
    with mock_models(LAT="0", FACT="1") as url:
        completion = ask(lambda: OPEN[name](url), lambda p: p.generate(MODELS[name], messages, Sampling()))
    assert completion.text == "LDA loads the accumulator."


def test_a_server_with_fewer_slots_than_wanted() -> None:
    with mock_models(LAT="0.05", CAP="8", RA="1") as url:
        _, outcomes = run(lambda: [lane("ollama", url, slots=32)], 400)
        stats = httpx.get(f"{url}/stats").json()
    assert len(outcomes) == 400 and all(outcome.completion for outcome in outcomes)
    assert stats["peak"] <= 8 and stats["repeated"] == 0


@each_provider
@pytest.mark.parametrize("settings", [{}, {"idle_timeout_s": 0.4}])
def test_a_server_that_does_everything_wrong(name: str, settings: dict[str, float]) -> None:
    faults = {"P429": "0.05", "P500": "0.05", "P503": "0.05", "DROP": "0.05", "TRUNC": "0.05", "STALL": "0.05"}
    with mock_models(LAT="0.01", RA="0.1", STALL_S="0.6", SEED="7", **faults) as url:
        _, outcomes = run(lambda: [lane(name, url, slots=8, timeout_s=5, **settings)], 80)
        stats = httpx.get(f"{url}/stats").json()
        answered = httpx.get(f"{url}/prompts").json()
    assert len(outcomes) == 80
    assert all(outcome.completion and outcome.completion.finish_reason == "stop" for outcome in outcomes)
    assert all(len(outcome.completion.text.split()) == 50 for outcome in outcomes if outcome.completion)
    assert sum(fault in stats for fault in ("429", "500", "503", "dropped", "truncated", "stalled")) >= 5
    assert len(set(answered)) == 80


def test_an_answer_to_a_cut_prompt_is_none() -> None:
    with mock_models(LAT="0.01", CUT="0.3", SEED="1") as url:
        _, outcomes = run(lambda: [lane("ollama", url)], 40)
        stats = httpx.get(f"{url}/stats").json()
    cut = [o for o in outcomes if o.completion and (o.completion.finish_reason, o.completion.detail) == ("other", "prompt cut")]
    assert len(cut) == stats["cut"] > 0 and len(outcomes) == 40


@each_api
def test_what_is_beyond_the_rpm_is_refused_with_the_wait(api: str) -> None:
    with mock_models(LAT="0", RPM="2") as url:
        for _ in range(2):
            ask(lambda: OPEN[api](url), lambda p: p.generate(MODELS[api], QUESTION, Sampling()))
        with pytest.raises(RateLimited) as raised:
            ask(lambda: OPEN[api](url), lambda p: p.generate(MODELS[api], QUESTION, Sampling()))
        stats = httpx.get(f"{url}/stats").json()
    assert raised.value.retry_after_s is not None and 50 < raised.value.retry_after_s <= 60 and not raised.value.per_day
    assert (stats["over_rpm"], stats["ok"]) == (1, 2)


@each_provider
def test_nobody_there(name: str) -> None:
    with pytest.raises(ProviderUnavailable, match=r"cannot connect to .*127.0.0.1:9") as raised:
        ask(lambda: OPEN[name]("http://127.0.0.1:9"), lambda p: p.models())
    assert raised.value.hint and not raised.value.billable


@each_provider
def test_models(name: str) -> None:
    with mock_models(MODELS="a:latest,b:7b") as url:
        assert ask(lambda: OPEN[name](url), lambda p: p.models()) == ["a:latest", "b:7b"]


def test_a_model_is_fetched_to_an_ollama_server() -> None:
    async def fetch(provider: OllamaProvider) -> tuple[list[str], list[str]]:
        steps = [step.status async for step in provider.pull("c:1b")]
        with pytest.raises(ModelMissing):
            [step async for step in provider.pull("unknown:1b")]
        return steps, await provider.models()

    with mock_models() as url:
        steps, models = ask(lambda: OllamaProvider(url), fetch)
    assert steps[0] == "pulling manifest" and steps[-1] == "success"
    assert models == ["mock:latest", "c:1b"]


# --- llmock, which grades the client ---------------------------------------------------------------------------------

IDLE_S = 0.3
STREAMED = {"idle_timeout_s": IDLE_S}
# What is done to the server, and whether the answers are streamed. Every task ends with an answer, and llmock finds no fault.
FAULTS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "rate limit": (lambda mock: mock.rate_limit(times=2, retry_after=0.5), False),
    **{
        f"status {status}": (lambda mock, status=status: mock.fail(status, times=2), False)
        for status in (408, 409, 429, 500, 502)
    },
    **{f"status {status}": (lambda mock, status=status: mock.fail(status, times=3), False) for status in (503, 504, 529)},
    "outage with a wait": (lambda mock: mock.fail(503, times=2, retry_after=0.4), False),
    "late": (lambda mock: mock.delay(2.5), False),
    "late, streamed": (lambda mock: mock.delay(2.5), True),
    "slow first piece": (lambda mock: mock.slow_first_token(1.5), True),
    "steady but slow": (lambda mock: mock.pace(60), True),
    **{
        f"{kind} after {count}": (lambda mock, kind=kind, count=count: getattr(mock, kind)(after_chunks=count, times=2), True)
        for kind in ("disconnect", "truncate")
        for count in (0, 2)
    },
    # Paced, because llmock has to be still sending to see that its client hangs up.
    **{
        f"corrupt after {count}": (lambda mock, count=count: mock.corrupt(after_chunks=count, times=2).pace(60), True)
        for count in (0, 2)
    },
    **{
        f"stall after {count}": (lambda mock, count=count: mock.stall(after_chunks=count, seconds=1.5, times=2), True)
        for count in (0, 2)
    },
}


def api_url(llmock: Any, api: str) -> str:
    return str(llmock.base_url(api))


def graded_run(llmock: Any, api: str, count: int = 4, timeout_s: float = 2.0, **settings: Any) -> list[Outcome]:
    _, outcomes = run(lambda: [lane(api, api_url(llmock, api), slots=2, timeout_s=timeout_s, **settings)], count)
    assert len(outcomes) == count
    llmock.assert_resilient(strict=True)
    return outcomes


@each_api
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(llmock: Any, api: str, fault: str) -> None:
    do, streamed = FAULTS[fault]
    do(llmock.reply("one two three four five six seven eight", times=None))
    outcomes = graded_run(llmock, api, **(STREAMED if streamed else {}))
    assert all(o.completion and o.completion.text == "one two three four five six seven eight" for o in outcomes)
    if fault not in ("steady but slow", "slow first piece"):
        assert any(request.fault or request.duration > 1 for request in llmock.requests)


@each_api
@pytest.mark.parametrize("fault", ["fail", "context_overflow"])
def test_what_cannot_succeed_is_not_retried(llmock: Any, api: str, fault: str) -> None:
    llmock.reply("fine")
    llmock.fail(400) if fault == "fail" else llmock.context_overflow()
    outcomes = graded_run(llmock, api, count=3)
    assert sum(bool(outcome.error) for outcome in outcomes) == 1


@each_api
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_at_once(llmock: Any, api: str, status: int) -> None:
    llmock.fail(status, times=None)
    with pytest.raises(AuthFailed):
        graded_run(llmock, api)
    llmock.assert_resilient(strict=True)
    assert len(llmock.requests) <= 2


@each_api
def test_a_quota_that_refills(llmock: Any, api: str) -> None:
    llmock.limits(rpm=60)  # 60 at once, then one a second
    outcomes = graded_run(llmock, api, count=63)
    assert all(outcome.completion for outcome in outcomes)
    assert any(request.status == 429 for request in llmock.requests)


@each_api
def test_a_mixture_of_faults(llmock: Any, api: str) -> None:
    llmock.rate_limit(times=3, retry_after=0.2).fail(503, times=2)
    llmock.disconnect(after_chunks=1).truncate(after_chunks=2).corrupt(after_chunks=3).stall(seconds=1.5, after_chunks=1)
    llmock.pace(60)
    outcomes = graded_run(llmock, api, count=12, **STREAMED)
    assert all(outcome.completion for outcome in outcomes)


@each_api
@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AuthFailed), (403, AuthFailed), (404, BadRequest), (429, RateLimited), (500, ProviderUnavailable), (503, Overloaded)],
)
def test_statuses(llmock: Any, api: str, status: int, error: type[ProviderError]) -> None:
    llmock.fail(status)
    with pytest.raises(error):
        ask(lambda: OPEN[api](api_url(llmock, api)), lambda p: p.generate(MODELS[api], QUESTION, Sampling()))


@each_api
def test_retry_after_reaches_the_error(llmock: Any, api: str) -> None:
    llmock.rate_limit(retry_after=7)
    with pytest.raises(RateLimited) as raised:
        ask(lambda: OPEN[api](api_url(llmock, api)), lambda p: p.generate(MODELS[api], QUESTION, Sampling()))
    assert raised.value.retry_after_s == 7 and not raised.value.per_day


@each_api
@pytest.mark.parametrize("fault", ["truncate", "disconnect", "corrupt"])
def test_a_broken_stream_of_a_chat_is_never_taken_for_whole(llmock: Any, api: str, fault: str) -> None:
    getattr(llmock.reply("one two three four five six seven eight"), fault)(after_chunks=2)
    with pytest.raises(ProviderUnavailable) as raised:
        ask(lambda: OPEN[api](api_url(llmock, api)), pieces(MODELS[api]))
    assert raised.value.billable


@each_api
def test_models_of_an_api(llmock: Any, api: str) -> None:
    assert MODELS[api] in ask(lambda: OPEN[api](api_url(llmock, api)), lambda p: p.models())
