"""`hafs train` over a real sshd, with jobs whose trainer is scripted: found by name on several nodes, followed through cuts."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from campaigns.cli import main as cli
from campaigns.locate import find
from campaigns.sync.survey import last_seen, survey
from config.contracts.sample import Provenance, Sample
from config.errors import JobNotFound
from config.settings import Settings
from tests.fakes.leftovers import end_nodes
from tests.fakes.relay import Relay
from tests.fakes.ssh_node import add_node
from tests.fakes.sshd import PrivateSshd
from tests.fakes.waiting import wait_for
from tests.integration.test_loop import finished, hafs
from trainer_node.jobdir import JobDir

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd"), pytest.mark.needs("ssh")]

DAEMON = Path(__file__).parents[1] / "fakes" / "daemon.py"
WAITS = ["stage RUNNING", "print it begins", "await go", "succeed"]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with PrivateSshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def said(*words: str) -> str:
    """What a command prints, run in this process: a new one each time would take most of the tests' time."""
    result = CliRunner().invoke(cli.app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def told(*words: str) -> Any:
    """The JSON that a command prints, behind what it says on stderr."""
    text = said(*words)
    return json.JSONDecoder().raw_decode(text[re.search(r"^[\[{]", text, re.MULTILINE).start() :])[0]  # type: ignore[union-attr]


class Desk:
    """A laptop with data, that submits jobs to nodes whose folders lie beside it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        rows = settings.training / "tiny" / "samples.jsonl"
        rows.parent.mkdir(parents=True)
        origin = Provenance(campaign="tiny", task_id="t")
        sample = Sample(id="1", domain="asm", source_id="s", messages=[], completion="it loads A", provenance=origin)
        rows.write_text(sample.model_dump_json() + "\n")

    def submit(self, *steps: str, name: str = "hafs-tiny", options: tuple[str, ...] = ("--node", "box")) -> str:
        """The id of a new job whose trainer does these steps."""
        spec = self.folder / "job.toml"
        script = json.dumps({"1": steps})
        spec.write_text(f"kind = 'sft'\nname = '{name}'\nbase = 'package:none'\ndata = ['tiny']\nsystem = '{script}'\n")
        return str(told("train", "submit", str(spec), *options, "--json")["id"])

    def job(self, id_: str, node: str = "node") -> JobDir:
        return JobDir(self.folder / node / "jobs" / id_)

    def state(self, id_: str) -> str:
        return str(find(survey(self.settings), id_).job.state)

    def let_go(self, id_: str, node: str = "node") -> None:
        (self.job(id_, node).path / "go").touch()


@pytest.fixture
def relay(sshd: PrivateSshd) -> Iterator[Relay]:
    with Relay(sshd.port) as relay:
        yield relay


@pytest.fixture
def desk(sshd: PrivateSshd, relay: Relay, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """With the node `box` behind a relay, its daemon running."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    settings = Settings(home=home)
    (tmp_path / "node").mkdir()
    with serving(tmp_path / "node"):
        add_node(settings, sshd, tmp_path / "node", port=relay.port)
        yield Desk(settings, tmp_path)
        end_nodes(tmp_path)


class serving:
    """A daemon of the node at `root` for as long as the block lasts."""

    def __init__(self, root: Path) -> None:
        self._argv = [sys.executable, "-P", str(DAEMON), str(root)]
        self._root = root

    def __enter__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        self._process = subprocess.Popen(self._argv, env=environment)
        wait_for("daemon", lambda: (self._root / "daemon.log").exists())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def test_a_log_is_followed_byte_for_byte_through_ten_cuts(desk: Desk, relay: Relay, tmp_path: Path) -> None:
    chance = random.Random(5)
    id_ = desk.submit(*WAITS)
    log = desk.job(id_).log_file(1)
    wait_for("its first line", lambda: log.exists() and b"it begins" in log.read_bytes())
    with (tmp_path / "copy").open("wb") as copy:
        follower = subprocess.Popen(
            [sys.executable, "-P", "-m", "campaigns.cli.main", "train", "logs", "hafs-tiny", "-f"],
            stdout=copy,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(10):
            with log.open("ab") as file:
                file.write(b"\xff\x1b[31m progress\r" + "Zeile ü𝄞\n".encode() + chance.randbytes(3000).hex().encode() + b"\n")
            there = log.stat().st_size
            wait_for("what was logged", lambda there=there: (tmp_path / "copy").stat().st_size >= there)
            relay.cut()
        with log.open("ab") as file:
            file.write(b"no line end")
        desk.let_go(id_)
        _, error = follower.communicate(timeout=60)
    assert follower.returncode == 0, error
    assert (tmp_path / "copy").read_bytes() == log.read_bytes()
    assert relay.connections >= 11


def test_a_job_outlives_the_laptop_and_is_told_of_by_whoever_follows(desk: Desk, relay: Relay, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    desk.settings.notify_file.write_text(f'[notify]\ncommand = ["tee", "{told}"]\n')
    killed = desk.submit(*WAITS)
    follower = hafs("train", "logs", killed, "-f")
    wait_for("following", lambda: desk.job(killed).log_file(1).exists())
    follower.send_signal(signal.SIGKILL)
    follower.communicate()
    assert desk.state(killed) not in ("FAILED", "SUCCEEDED")
    desk.let_go(killed)
    wait_for("its end", lambda: desk.state(killed) == "SUCCEEDED")
    assert not told.exists(), "nobody followed it to its end"

    watched = desk.submit(*WAITS)
    watcher = hafs("train", "watch", "hafs-tiny")
    wait_for("watching", lambda: desk.job(watched).log_file(1).exists())
    relay.cut()
    assert watcher.stdout is not None
    line = watcher.stdout.readline()
    desk.let_go(watched)
    assert "registered tiny:v1" in finished(watcher) and watched in line
    notice = json.loads(told.read_text())
    assert (notice["job"], notice["node"], notice["state"]) == (watched, "box", "SUCCEEDED")


def test_jobs_of_several_nodes_are_found_and_a_silent_one_is_unknown(desk: Desk, sshd: PrivateSshd, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    with serving(tmp_path / "far"):
        add_node(desk.settings, sshd, tmp_path / "far", name="far")
        first = desk.submit(*WAITS)
        second = desk.submit(*WAITS, name="other", options=("--node", "far", "--priority", "5"))
        listed = told("train", "list", "--json")
        assert {(job["id"], job["node"]) for job in listed} == {(first, "box"), (second, "far")}
        chained = desk.submit("succeed", name="chained", options=("--after", "other"))
        assert (desk.settings.jobs.exists(), desk.job(chained, "far").job().after) == (True, second)

        text = desk.settings.nodes_file.read_text()
        desk.settings.nodes_file.write_text(text.replace(f"port = {sshd.port}", "port = 1"))
        shown = said("train", "status")
        assert "far: unknown since " in shown and second in shown and "FAILED" not in shown
        job = told("train", "status", "other", "--json")
        assert job["id"] == second and job["unknown_since"] == pytest.approx(last_seen(desk.settings, "far").at)
        with pytest.raises(JobNotFound, match="not asked: far"):
            said("train", "cancel", "nothing")
        overview = said("status")
        assert first in overview and "unknown since" in overview

        desk.settings.nodes_file.write_text(text)
        desk.let_go(second, "far")
        wait_for("the chain", lambda: desk.state("chained") == "SUCCEEDED")
    said("train", "cancel", first[:8], "--node", "box")
    wait_for("the cancel", lambda: desk.state(first) == "CANCELLED")


def test_auto_takes_the_node_that_is_free_and_has_the_data(desk: Desk, sshd: PrivateSshd, tmp_path: Path) -> None:
    desk.submit(*WAITS)
    (tmp_path / "idle").mkdir()
    add_node(desk.settings, sshd, tmp_path / "idle", name="idle")
    with serving(tmp_path / "idle"):
        before = desk.submit("succeed", options=("--node", "idle"))
        wait_for("its end", lambda: desk.state(before) == "SUCCEEDED")
        shown = said("train", "submit", str(tmp_path / "job.toml"), "--node", "auto")
    assert "chosen idle: no GPU seen; nothing to do; has the data" in shown
    assert "not    box: no GPU seen; 1 job not ended; has the data" in shown
    assert "is queued on idle" in shown
