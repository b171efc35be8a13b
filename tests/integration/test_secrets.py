"""A planted key comes to light nowhere, whatever servers do with it; what is private is never sent away.

The servers of these tests (tests/fakes/echoing_models.py) repeat in every error the key that they were sent.
"""

import io
import json
import os
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import anyio
import pytest

from agents.providers.gemini_batch import BatchProvider
from agents.providers.gemini_jobs import BatchJobs
from agents.providers.transport import hide
from agents.task import Sampling
from campaigns.cli.main import main
from config.contracts.sample import Message
from config.errors import ProviderError
from config.locks import holder
from config.settings import load_settings
from tests.fakes.echoing_models import Echoing, Handler
from tests.fakes.ports import free_port
from tests.fakes.waiting import wait_for

pytestmark = pytest.mark.integration

MARK = "PLANTED"  # in every key, between signs that JSON and addresses may write in another way
GEMINI_KEY, OPENAI_KEY, OLLAMA_KEY = (f"k/{MARK}{name}+7f3a==" for name in ("gemini", "openai", "ollama"))
FAULTS = [
    "401",
    "403",
    "400",
    "404",
    "429",
    "500",
    "503",
    "escaped",
    "page",
    "redirect",
    "drop",
    "cut",
    "torn",
    "stall",
    "inside",
]
CAMPAIGN = 'name = "c"\ntarget = {target}\n\n[domains.asm]\nshare = 1.0\nprivate = {private}\n\n'
LANE = {
    "gemini": 'provider = "gemini"\nmodel = "m"\nbase_url = "{url}"\n',
    "openai": 'provider = "openai"\nmodel = "m"\nbase_url = "{url}"\nown = false\n',
    "ollama": 'provider = "ollama"\nmodel = "m"\nhost = "{url}"\n',
}


@pytest.fixture
def server() -> Iterator[Echoing]:
    served = Echoing()
    thread = threading.Thread(target=served.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.over.set()
    served.shutdown()
    served.server_close()
    thread.join()


# --- the hunt -----------------------------------------------------------------------------------------------------------------


class Hunt:
    """Runs commands and keeps all that they say."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.said: list[str] = []

    def spec(self, text: str, *, target: int = 3, private: bool = False) -> Path:
        path = self.folder / "c.toml"
        path.write_text(CAMPAIGN.format(target=target, private=str(private).lower()) + text)
        return path

    def run(self, *words: str | Path, code: int | None = None, program: str = "") -> str:
        command = [sys.executable, "-P", *(["-c", program] if program else ["-m", "campaigns.cli.main"])]
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run(
            [*command, *map(str, words)], capture_output=True, text=True, timeout=90, check=False, env=environment
        )
        said = f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        self.said.append(said)
        assert code is None or done.returncode == code, said
        return said

    def here(self, *words: str | Path, code: int) -> str:
        """The same without a process of its own: for what ends before anything is done."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["hafs", *map(str, words)])
            with redirect_stdout(out), redirect_stderr(err):
                main()
        said = f"{words}: exit code {ended.value.code}\n{out.getvalue()}{err.getvalue()}"
        self.said.append(said)
        assert ended.value.code == code, said
        return said

    def assert_nothing_found(self) -> None:
        found = [said for said in self.said if MARK in said]
        assert not found, found[0]
        for path in sorted(self.home.rglob("*")):
            if path.is_file() and path != load_settings().keys_file:
                data = path.read_bytes()
                where = data.find(MARK.encode())
                assert where < 0, f"{path}: {data[max(0, where - 200) : where + 100]!r}"


@pytest.fixture
def hunt(home: Path, tmp_path: Path) -> Hunt:
    return Hunt(home, tmp_path)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in (("GEMINI_API_KEY", GEMINI_KEY), ("OPENAI_API_KEY", OPENAI_KEY), ("OLLAMA_API_KEY", OLLAMA_KEY)):
        monkeypatch.setenv(name, key)


def lane(name: str, provider: str, url: str, more: str = "") -> str:
    if provider == "openai" and "api_key_env" not in more:
        more = f'api_key_env = "OPENAI_API_KEY"\n{more}'
    return f"[lanes.{name}]\n{LANE[provider].format(url=url)}{more}\n"


def all_lanes(url: str, more: str = "") -> str:
    """Every fault of every provider, streamed where that is another code, beside three lanes that work."""
    lanes = [lane(f"{provider}-fine", provider, f"{url}/fine", f"slots = 1\n{more}") for provider in LANE]
    lanes += [lane(f"{provider}-dead", provider, "http://127.0.0.1:9/dead", f'timeout = "1s"\n{more}') for provider in LANE]
    for number, fault in enumerate(FAULTS):
        for provider in LANE:
            waits = 'slots = 2\ntimeout = "1s"\n' + ('idle_timeout = "0.5s"\n' if fault == "inside" or number % 2 else "")
            lanes.append(lane(f"{provider}-{fault}", provider, f"{url}/{fault}", waits + (more if provider == "openai" else "")))
    return "".join(lanes)


OBSERVED = """
[observe]
prometheus_port = {port}

[notify]
command = ["{python}", "-c", "import sys; open({file!r}, 'w').write(sys.stdin.read())"]
url = "{url}/hook?token={token}"
"""


@pytest.mark.usefixtures("planted")
def test_no_fault_of_a_server_brings_a_key_to_light(hunt: Hunt, home: Path, server: Echoing) -> None:
    """In the background, killed, resumed, looked at in every way."""
    port, notice, token = free_port(), home / "notice.json", "a-secret-of-the-webhook"
    observed = OBSERVED.format(port=port, python=sys.executable, file=str(notice), url=server.url, token=token)
    path = hunt.spec(observed + all_lanes(server.url), target=100)
    hunt.run("campaign", "start", path, "--detach", code=0)
    log = home / "logs" / "campaign_c.log"
    wait_for("fault of each kind", lambda: all(server.asked[fault] for fault in FAULTS))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        hunt.said.append(reply.read().decode())
    assert "hafs_calls_total" in hunt.said[-1]
    pid = holder(home / "training" / "c" / "campaign.lock")
    assert pid, log.read_text()
    os.kill(pid, 9)
    wait_for("end", lambda: holder(home / "training" / "c" / "campaign.lock") is None)
    hunt.assert_nothing_found()

    hunt.run("campaign", "resume", "c", code=0)
    for words in ("status c --json", "report c --json", "logs c", "list"):
        hunt.here("campaign", *words.split(), code=0)
    hunt.assert_nothing_found()
    assert server.keys == {"", GEMINI_KEY, OPENAI_KEY, OLLAMA_KEY}, "all keys were sent, none to the webhook"
    assert {f"{provider}-{fault}" for provider in LANE for fault in ("401", "500") if f"{provider}-{fault}" in log.read_text()}
    assert "*** is no good model" in log.read_text(), "what servers say is told"
    assert server.notices and MARK not in str(server.notices) and notice.exists()
    told = [path for path in home.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert [file.name for file in told] == ["campaign.json"] and token not in str(hunt.said)
    if os.name == "posix":
        assert stat.S_IMODE(told[0].stat().st_mode) == 0o600


@pytest.mark.usefixtures("planted")
def test_a_probe_and_the_doctor_keep_it_too(hunt: Hunt, server: Echoing) -> None:
    path = hunt.spec(all_lanes(server.url))
    said = hunt.run("campaign", "check", path, "--probe", "--json")
    assert said.count("***") >= 3 * 5, said
    refused = "".join(lane(provider, provider, f"{server.url}/closed-{provider}") for provider in LANE)
    said = hunt.run("doctor", hunt.spec(refused), code=1)
    assert said.count("***") >= 2, said
    hunt.run("campaign", "start", hunt.spec(refused), code=12)
    hunt.assert_nothing_found()


def test_keys_of_the_file_are_used_and_kept(hunt: Hunt, home: Path, server: Echoing, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    settings.keep_key("GEMINI_API_KEY", GEMINI_KEY)
    settings.keep_key("LAB_KEY", OPENAI_KEY)
    settings.keep_key("OLLAMA_API_KEY", OLLAMA_KEY)
    lanes = lane("a", "gemini", f"{server.url}/401") + lane("b", "openai", f"{server.url}/500", 'api_key_env = "LAB_KEY"\n')
    lanes += lane("c", "ollama", f"{server.url}/fine", "slots = 1\n")
    hunt.run("campaign", "start", hunt.spec(lanes, target=20), code=0)
    assert server.prompted == {GEMINI_KEY, OPENAI_KEY, OLLAMA_KEY}
    server.keys.clear()
    hunt.here("doctor", hunt.folder / "c.toml", code=0)
    assert {GEMINI_KEY, OPENAI_KEY} <= server.keys
    hunt.assert_nothing_found()
    if os.name == "posix":
        assert stat.S_IMODE(settings.keys_file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
def test_a_file_of_keys_that_others_could_read_is_closed_by_the_next_key(home: Path) -> None:
    home.mkdir()
    settings = load_settings()
    settings.keys_file.write_text('[keys]\nOLD_KEY = "o"\n')
    settings.keys_file.chmod(0o644)
    settings.keep_key("NEW_KEY", "n")
    assert stat.S_IMODE(settings.keys_file.stat().st_mode) == 0o600
    assert (settings.key("OLD_KEY"), settings.key("NEW_KEY")) == ("o", "n")


EXPLODES = """
from campaigns.domains import registry
from campaigns.cli.main import main
from campaigns.domains.asm.domain import AsmDomain
def verify(self, item, text):
    raise RuntimeError("a bug")
AsmDomain.verify = verify
main()
"""


@pytest.mark.usefixtures("planted")
def test_a_traceback_holds_no_key(hunt: Hunt, home: Path, server: Echoing) -> None:
    lanes = "".join(lane(provider, provider, f"{server.url}/fine") for provider in LANE)
    said = hunt.run("campaign", "start", hunt.spec(lanes), code=1, program=EXPLODES)
    assert "Traceback" in said and "RuntimeError: a bug" in said
    assert "RuntimeError: a bug" in (home / "logs" / "campaign_c.log").read_text()
    hunt.assert_nothing_found()


@pytest.mark.parametrize(
    ("provider", "address"),
    [
        ("ollama", "http://user:{}@127.0.0.1"),
        ("openai", "https://{}@h/v1"),
        ("gemini", "http://h/?key={}"),
        ("openai", "http://h#{}"),
    ],
)
def test_a_key_in_an_address_is_refused_and_not_repeated(hunt: Hunt, provider: str, address: str) -> None:
    spec = hunt.spec(lane("a", provider, address.format(MARK)))
    for words in ("campaign start", "campaign check", "doctor"):
        said = hunt.here(*words.split(), spec, code=3)
        assert "c.toml:" in said and "holds no user, password or query" in said
    hunt.assert_nothing_found()


def test_a_key_is_not_repeated_beside_another_mistake(hunt: Hunt) -> None:
    pasted = lane("a", "openai", "http://127.0.0.1:9", f'api_key_env = "sk-{MARK}"\n')
    assert "never the key itself" in hunt.here("campaign", "check", hunt.spec(pasted), code=3)
    two = lane("a", "openai", f"http://{MARK}@127.0.0.1:9", 'host = "h"\n')
    hunt.here("campaign", "check", hunt.spec(two), code=3)
    lacking = lane("a", "openai", "http://127.0.0.1:9", 'models = ["n"]\n') + f'[notify]\nurl = "http://h/{MARK}"\n'
    hunt.here("campaign", "check", hunt.spec(lacking), code=3)
    hunt.assert_nothing_found()


def test_a_key_in_an_address_of_the_environment_is_not_repeated(hunt: Hunt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"http://user:{MARK}@127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", f"http://127.0.0.1:9/?key={MARK}")
    monkeypatch.setenv("GEMINI_API_KEY", "k-of-no-account")
    said = hunt.here("doctor", code=0)
    assert "the host of Ollama holds" in said and "the address for Gemini holds" in said
    hunt.here("init", "--yes", hunt.folder / "new", code=3)
    hunt.here("campaign", "start", hunt.spec(lane("a", "gemini", "")), code=3)
    hunt.assert_nothing_found()


@pytest.mark.parametrize("text", ['keys = "{}"', '[keys]\nGEMINI_API_KEY = ["{}"]', "[keys]\nGEMINI_API_KEY = {}"])
def test_a_broken_file_of_keys_is_not_repeated(hunt: Hunt, home: Path, text: str) -> None:
    home.mkdir()
    load_settings().keys_file.write_text(text.format(MARK))
    assert "keys.toml:" in hunt.here("campaign", "start", hunt.spec(lane("a", "gemini", "http://127.0.0.1:9")), code=3)
    hunt.assert_nothing_found()


@pytest.mark.parametrize("spelling", ["k/ey+7=", r"k\/ey+7=", "k%2Fey%2B7%3D", r"k\u002Fey\u002b7=", r"k\\\/ey+7="])
def test_a_secret_is_hidden_however_it_is_spelled(spelling: str) -> None:
    assert hide(f'{{"error": "{spelling} is no key"}}', "k/ey+7=") == '{"error": "*** is no key"}'
    assert hide("kxey+7=", "k/ey+7=") == "kxey+7=" and hide("nothing", "") == "nothing"


# --- batches ------------------------------------------------------------------------------------------------------------------


class Batches(Handler):
    """Enough of the batch API for one job. Every line of its answers repeats the key, and so does every refusal."""

    lines: list[bytes] = []
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._fault()
        if "batchGenerateContent" in self.path:
            return self._refuse(403) if self.refuses else self._send(200, json.dumps(self._job(done=False)).encode())
        type(self).lines = [*self.lines, *body.splitlines()] if self.path == "/sent" else self.lines
        file = json.dumps({"file": {"name": "files/in"}}).encode()
        address = f"{self.server.url}/sent"
        self._send(200, file, {"X-Goog-Upload-URL": address, "X-Goog-Upload-Status": "final"})

    def do_GET(self) -> None:
        self._fault()
        if ":download" not in self.path:
            return self._send(200, json.dumps(self._job(done=True)).encode())
        wrong = {"error": {"code": 3, "message": self._echo()}}
        lines = [json.dumps({"key": json.loads(line)["key"], **wrong}) for line in self.lines]
        self._send(200, "\n".join(lines).replace("/", "\\/").encode())

    def _job(self, *, done: bool) -> dict[str, Any]:
        state = {"model": "models/m", "displayName": "d", "state": f"BATCH_STATE_{'SUCCEEDED' if done else 'PENDING'}"}
        output = {"output": {"responsesFile": "files/out"}} if done else {}
        return {"name": "batches/0", "done": done, "metadata": {**state, **output}}


@pytest.mark.parametrize("refuses", [True, False])
def test_the_journal_of_batches_holds_no_key(
    tmp_path: Path, server: Echoing, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    monkeypatch.setattr(Batches, "refuses", refuses)
    monkeypatch.setattr(Batches, "lines", [])
    server.RequestHandlerClass = Batches
    errors: list[ProviderError] = []
    answers: list[str] = []  # as they are kept on the disk

    async def ask() -> None:
        jobs = BatchJobs(base_url=server.url, api_key=GEMINI_KEY)
        provider = BatchProvider(jobs, tmp_path / "j", patience_s=30, gather_s=0.01, settle_s=0.01, poll_s=(0.01, 0.02))
        try:
            await provider.generate("m", [Message(role="user", content="x")], Sampling())
        except ProviderError as error:
            errors.append(error)
            answers.append((await jobs.fetch("files/out")).decode())
            with pytest.raises(ProviderError) as refused:  # as its line would have been kept by another version
                jobs.completion({"key": "x", "error": {"code": 3, "message": GEMINI_KEY}}, "m", Sampling(), 0.0)
            errors.append(refused.value)
        finally:
            await provider.aclose()

    anyio.run(ask)
    assert "***" in str(errors[0]) and MARK not in str(errors) + str(errors[0].__dict__)
    kept = [path.read_text() for path in (tmp_path / "j").iterdir()]
    assert MARK not in str(kept + answers)
    assert refuses or "*** is no good model" in answers[0]


# --- what is private ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planted")
def test_what_is_private_is_an_error_before_anything_is_sent(hunt: Hunt, home: Path, server: Echoing) -> None:
    """With lanes of others only: at the start, at a check with its probe, and when the routing of a campaign has changed."""
    (hunt.folder / "game.asm").write_text("LDA #$10\nSTA $2100\n")
    away = lane("flash", "gemini", f"{server.url}/fine") + lane("vendor", "openai", f"{server.url}/fine")
    both = lane("gpu", "ollama", f"{server.url}/fine") + away
    private_source = '[[sources.asm]]\npath = "*.asm"\nprivate = true\n'
    for text, private in ((away, True), (away + private_source, False)):
        for words in ("campaign start", "campaign start --detach", "campaign check", "campaign check --probe"):
            said = hunt.here(*words.split(), hunt.spec(text, private=private), code=3)
            assert 'domain "asm" is private, and none of its lanes is a machine of yours' in said
    assert not server.asked

    hunt.run("campaign", "start", hunt.spec(both, private=True), code=0)
    assert server.prompted == {OLLAMA_KEY}
    server.asked.clear()
    hunt.here("campaign", "start", hunt.spec(both + '[routing]\nasm = ["flash"]\n', target=9, private=True), code=3)
    stored = home / "training" / "c" / "campaign.json"
    changed = stored.read_text().replace('"routing": {}', '"routing": {"asm": ["flash"]}')
    assert changed != stored.read_text()
    stored.write_text(changed)
    hunt.here("campaign", "resume", "c", code=23)
    assert not server.asked
