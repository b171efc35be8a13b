"""hafs onto an empty account behind a real sshd: nothing there but Python and what its pip is configured to use.

The whole of it installs torch and trains, which takes minutes: HAFS_SETUP=1. Without, the same way is gone with a hafs that
cannot train, so that its doctor has to stop the switch, and with one that finds torch installed already.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from campaigns import nodes
from campaigns.cli.main import main
from campaigns.sync import setup as node_setup
from campaigns.sync import wheel as own
from campaigns.sync.remote import connect
from campaigns.sync.setup import Options, Progress
from campaigns.sync.setup import setup as set_up
from config.contracts.job import JobState, JobView
from config.contracts.sample import Message, Provenance, Sample
from config.contracts.wire import STATUS, JobArgs
from config.errors import NodeError
from config.locks import holder
from config.settings import NodeSettings, Settings
from tests.fakes.leftovers import end_nodes
from tests.fakes.sshd import PrivateSshd
from tests.fakes.tiny_model import write_tiny_model
from tests.fakes.waiting import wait_for
from tests.integration.test_loop import finished, hafs

pytestmark = [pytest.mark.integration, pytest.mark.needs("sshd"), pytest.mark.needs("ssh")]

WHOLE = os.environ.get("HAFS_SETUP") == "1"
OWN_SERVICES = Path("/run/systemd/system").exists()  # then the account's services would be the developer's own


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A home folder with nothing in it but the configuration of pip that this machine's pip has."""
    account = tmp_path / "account"
    (account / ".config" / "pip").mkdir(parents=True)
    own = Path("~/.config/pip/pip.conf").expanduser()
    text = own.read_text() if own.exists() else "[global]\n"
    constraints = Path("constraints.txt").resolve()
    (account / ".config" / "pip" / "pip.conf").write_text(text.replace("[global]", f"[global]\nconstraint = {constraints}\n"))
    return account


@pytest.fixture
def sshd(tmp_path: Path, account: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateSshd]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    python = Path(shutil.which("python3") or "").resolve().parent
    session = {"HOME": str(account), "PATH": f"{python}:/usr/bin:/bin", "HAFS_RUNTIME": "embedded", "OMP_NUM_THREADS": "1"}
    session |= {name: value for name, value in os.environ.items() if name.upper().startswith(("PIP_", "HTTP", "SSL_"))}
    with PrivateSshd(tmp_path / "sshd", **session) as server:
        yield server
        end_nodes(account)


@pytest.fixture
def torch_is_there(sshd: PrivateSshd, tmp_path: Path) -> None:
    """pip in any environment of the account finds what this one has, but hafs: nothing is left to install."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "hafs" not in path.name and path.suffix != ".pth":
            (shelf / path.name).symlink_to(path)
    sshd.stop()
    sshd.environment["PYTHONPATH"] = str(shelf)
    sshd.start()


@pytest.fixture
def settings(sshd: PrivateSshd, home: Path) -> Settings:
    settings = Settings(home=home)
    node = NodeSettings(host="127.0.0.1", port=sshd.port, user=sshd.user, identity=str(sshd.identity))
    nodes.add(settings, "box", node, lambda key: True)
    return settings


class Told(list[str]):
    def progress(self) -> Progress:
        return Progress(step=self.append, working=lambda text: None)


OPTIONS = Options(pip_args=("--no-compile",), service=False if OWN_SERVICES else None)


@pytest.fixture(autouse=True)
def wheel(monkeypatch: pytest.MonkeyPatch) -> own.Wheel:
    """One wheel for the whole test, whoever edits the source meanwhile."""
    made = own.own_wheel()
    monkeypatch.setattr(node_setup, "own_wheel", lambda: made)
    return made


def test_what_is_not_healthy_is_installed_beside_and_never_used(settings: Settings, account: Path) -> None:
    told = Told()
    before = settings.nodes_file.read_bytes()
    with pytest.raises(NodeError, match=r"box is not ready: .*node packages: missing: .*torch") as refused:
        set_up(settings, "box", OPTIONS, told.progress(), extras=())
    assert "hafs nodes setup box" in refused.value.hint
    assert settings.nodes_file.read_bytes() == before
    (environment,) = environments_of(account)
    assert json.loads((environment / "environment.json").read_text())["pip_args"] == ["--no-compile"]
    answer = subprocess.run(
        [environment / "bin" / "hafs-node", "rpc", "--root", account / "node"],
        input=b'{"verb": "ping"}\n',
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert json.loads(answer.stdout)["result"]["protocol"] == 1

    made = environment.stat().st_ino
    again = Told()
    with pytest.raises(NodeError, match="box is not ready"):
        set_up(settings, "box", OPTIONS, again.progress(), extras=())
    assert any("is there already" in line for line in again)
    assert [path.stat().st_ino for path in environments_of(account)] == [made]


def environments_of(account: Path) -> list[Path]:
    return [path for path in (account / ".context" / "node" / "env").iterdir() if path.is_dir()]


def daemon_of(account: Path) -> int:
    return holder(account / ".context" / "node" / "daemon.lock") or 0


JOB = """
kind = "sft"
name = "NAME"
base = "BASE"
data = ["tiny"]
probe = "What does LDA #$10 do?"

[train]
epochs = EPOCHS
lr = 1e-2
save_steps = 5
max_length = 192
dtype = "float32"
"""


def submit(settings: Settings, folder: Path, name: str, epochs: int) -> None:
    base = write_tiny_model(folder / "tiny.gguf")
    spec = folder / f"{name}.toml"
    spec.write_text(JOB.replace("NAME", name).replace("BASE", str(base)).replace("EPOCHS", str(epochs)))
    finished(hafs("train", "submit", str(spec), "--node", "box"))


def job_named(settings: Settings, name: str) -> JobView:
    with connect(settings, "box") as node:
        return node.call(STATUS, JobArgs(job=name)).jobs[0]


def write_rows(settings: Settings) -> None:
    path = settings.training / "tiny" / "samples.jsonl"
    path.parent.mkdir(parents=True)
    provenance = Provenance(campaign="tiny", task_id="t")
    with path.open("w") as file:
        for number in range(66):
            asked = [
                Message(role="system", content="You know the 65816."),
                Message(role="user", content=f"What does LDA #${number:02X} do?"),
            ]
            said = f"It loads ${number:02X} into A."
            row = Sample(
                id=str(number), domain="asm", source_id=str(number), messages=asked, completion=said, provenance=provenance
            )
            file.write(row.model_dump_json() + "\n")


class CutOff(BaseException):
    """The laptop dies."""


class CutAfter(list[str]):
    """What a setup said until it was cut off, once so many steps were done."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def progress(self) -> Progress:
        return Progress(step=self._on_step, working=lambda text: None)

    def _on_step(self, text: str) -> None:
        self.append(text)
        if len(self) == self._steps:
            raise CutOff


@pytest.mark.skipif(not WHOLE, reason="eight setups: HAFS_SETUP=1")
@pytest.mark.usefixtures("torch_is_there")
@pytest.mark.timeout(900)
def test_a_setup_that_is_cut_off_after_any_step_is_run_again(settings: Settings, account: Path) -> None:
    before = settings.nodes_file.read_bytes()
    for steps in (1, 2, 3, 4, 5, 4, 5):  # once the doctor was content, all is installed: two steps less
        cut = CutAfter(steps)
        with pytest.raises(CutOff):
            set_up(settings, "box", OPTIONS, cut.progress())
        switched = cut[-1].startswith("nodes.toml")
        assert (settings.nodes_file.read_bytes() == before) is not switched
    assert switched, "the last step but one"
    checks = set_up(settings, "box", OPTIONS, Told().progress())
    assert all(check.ok for check in checks)
    assert environments_of(account) == [Path(settings.node("box").command).parent.parent]


@pytest.mark.usefixtures("torch_is_there")
@pytest.mark.timeout(400)
def test_an_upgrade_leaves_a_real_job_alone(
    settings: Settings, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: own.Wheel
) -> None:
    told = Told()
    assert all(check.ok for check in set_up(settings, "box", OPTIONS, told.progress()))
    first = Path(settings.node("box").command).parent.parent
    assert environments_of(account) == [first]

    write_rows(settings)
    submit(settings, tmp_path, "long", 60)
    wait_for("training", lambda: job_named(settings, "long").state is JobState.RUNNING, 120)
    pipeline = process_below(account, "trainer_node.pipeline")
    pipeline.suspend()  # so that the job is certain to be there when the upgrade is done
    daemon = daemon_of(account)
    monkeypatch.setattr(node_setup, "own_wheel", lambda: later(wheel))
    set_up(settings, "box", Options(), told.progress())
    second = Path(settings.node("box").command).parent.parent
    assert second != first and set(environments_of(account)) == {first, second}

    job = job_named(settings, "long")
    assert (job.state, job.attempt) == (JobState.RUNNING, 1)
    assert pipeline.is_running() and pipeline.cmdline()[0].startswith(str(first))
    running = psutil.Process(daemon_of(account))
    assert running.pid != daemon and running.cmdline()[0].startswith(str(second)), "the daemon is the new one"
    pipeline.resume()
    finished(hafs("train", "cancel", "long", "--node", "box"))
    wait_for("end", lambda: job_named(settings, "long").state.ended, 60)
    job = job_named(settings, "long")
    assert (job.state, job.attempt) == (JobState.CANCELLED, 1), "the new daemon rules the old job"


@pytest.mark.skipif(not WHOLE, reason="installs torch: HAFS_SETUP=1")
@pytest.mark.timeout(1500)
def test_an_empty_account_trains_and_an_upgrade_leaves_the_job_alone(
    settings: Settings,
    account: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wheel: own.Wheel,
) -> None:
    settings.nodes_file.write_text("# mine\n" + settings.nodes_file.read_text())
    write_rows(settings)
    options = ["--pip-args=--no-compile", *(["--no-service"] if OWN_SERVICES else [])]
    monkeypatch.setattr(sys, "argv", ["hafs", "nodes", "setup", "box", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "FAIL" not in said
    assert all(f"ok    {name}: " in said for name in ("Python", "torch", "model server", "service", "clock")), said
    command = settings.node("box").command
    environments = account / ".context" / "node" / "env"
    assert Path(command).is_relative_to(environments) and settings.nodes_file.read_text().startswith("# mine\n[nodes.box]")
    (first,) = environments_of(account)

    again = Told()
    set_up(settings, "box", Options(), again.progress())
    assert any("is there already" in line for line in again) and settings.node("box").command == command
    assert "ok    torch" in finished(hafs("nodes", "doctor", "box"))

    submit(settings, tmp_path, "short", 1)
    wait_for("job", lambda: job_named(settings, "short").state.ended, 300)
    assert job_named(settings, "short").state is JobState.SUCCEEDED

    submit(settings, tmp_path, "long", 60)
    wait_for("training", lambda: job_named(settings, "long").state is JobState.RUNNING, 300)
    monkeypatch.setattr(node_setup, "own_wheel", lambda: later(wheel))
    pipeline = process_below(account, "trainer_node.pipeline")
    pipeline.suspend()  # so that the job is certain to be there when the upgrade is done
    set_up(settings, "box", Options(), again.progress())
    assert settings.node("box").command != command and len(environments_of(account)) == 2
    running = job_named(settings, "long")
    assert running.state is JobState.RUNNING and running.attempt == 1
    pipeline.resume()
    wait_for("job", lambda: job_named(settings, "long").state.ended, 400)
    job = job_named(settings, "long")
    assert job.state is JobState.SUCCEEDED and job.attempt == 1

    assert first in environments_of(account), "its model server still runs from there"
    server = process_below(account, "runtime")
    server.terminate()
    psutil.wait_procs([server], timeout=30)
    set_up(settings, "box", Options(), again.progress())
    assert first not in environments_of(account) and len(environments_of(account)) == 1


def process_below(account: Path, word: str) -> psutil.Process:
    """The process of this account's node with that word in its command line, where a runner names its pipeline, too."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0].startswith(str(account)) and word in words and "trainer_node.runner" not in words:
            return process
    raise AssertionError(f"no {word}")


def later(wheel: own.Wheel) -> own.Wheel:
    """The same hafs, named as another."""
    return own.Wheel(wheel.name, "f" * 64, wheel.data)
