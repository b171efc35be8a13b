"""A laptop and a node with an sshd between them: data goes there, SFT and DPO run, results and answers come back."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.leftovers import end_nodes
from tests.fakes.served import served
from tests.fakes.sshd import PrivateSshd
from tests.fakes.tiny_model import write_tiny_model
from tests.integration.test_loop import SFT, finished, hafs

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.needs("sshd"),
    pytest.mark.needs("ssh"),
]

SPEC = """
name = "tiny"
target = 66
domains = { asm = 1.0 }

[lanes.teacher]
provider = "ollama"
host = "URL"
model = "teacher"
slots = 8
"""
DPO = """
kind = "dpo"
name = "hafs-tiny-dpo"
base = "BASE"
start = "hafs-tiny"
data = ["tiny-pairs"]
probe = "What does LDA #$10 do?"

[train]
epochs = 2
lr = 1e-3
batch = 4
max_length = 192
dtype = "float32"
"""


@pytest.fixture
def sshd(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateSshd]:
    """The node `box` in nodes.toml, its key not trusted yet."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with PrivateSshd(tmp_path / "sshd") as server:
        home.mkdir()
        command = Path(sys.executable).parent / "hafs-node"
        lines = {"host": "127.0.0.1", "user": server.user, "identity": str(server.identity), "command": str(command)}
        lines["root"] = str(tmp_path / "node")
        text = "".join(f'{key} = "{value}"\n' for key, value in lines.items())
        (home / "nodes.toml").write_text(f"[nodes.box]\nport = {server.port}\n{text}")
        yield server
        end_nodes(tmp_path)


@pytest.fixture
def specs(tmp_path: Path) -> Iterator[Path]:
    base = str(write_tiny_model(tmp_path / "tiny.gguf"))
    (tmp_path / "sft.toml").write_text(SFT.replace("BASE", base))
    (tmp_path / "dpo.toml").write_text(DPO.replace("BASE", base))
    with served("fact_ollama", tmp_path) as url:
        (tmp_path / "campaign.toml").write_text(SPEC.replace("URL", url))
        yield tmp_path


def test_sft_then_dpo_on_a_node_over_ssh(sshd: PrivateSshd, specs: Path, home: Path, tmp_path: Path) -> None:
    refused = finished(hafs("nodes", "check", "box"), 32)
    assert "SHA256:" in refused and "hafs nodes trust box" in refused
    assert "SHA256:" in finished(hafs("nodes", "trust", "box", "--yes"))
    assert str(tmp_path / "node") in finished(hafs("nodes", "check", "box"))

    finished(hafs("campaign", "start", str(specs / "campaign.toml")))
    output = finished(hafs("train", "submit", str(specs / "sft.toml"), "--node", "box", "--follow"))
    assert "have the same tokens at the runtime" in output
    assert "registered hafs-tiny:v1, also hafs-tiny:latest" in output

    finished(hafs("data", "pairs", str(specs / "campaign.toml"), "--name", "tiny-pairs"))
    pairs = [json.loads(line) for line in (home / "training" / "tiny-pairs" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 66 and len({pair["change"] for pair in pairs}) > 3
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    output = finished(hafs("train", "submit", str(specs / "dpo.toml"), "--node", "box", "--follow"))
    assert "registered hafs-tiny-dpo:v1" in output
    assert "reward accuracy against the reference" in output and "chosen likelier" in output
    jobs = json.loads(finished(hafs("train", "status", "--node", "box", "--json")))
    assert [job["state"] for job in jobs] == ["SUCCEEDED", "SUCCEEDED"]
    scores = next(job for job in jobs if job["kind"] == "dpo")["result"]["pairs"]
    assert scores["pairs"] >= 4
    assert 0 <= scores["reward_accuracy"] <= 1 and 0 <= scores["chosen_likelier"] <= 1

    for model in ("hafs-tiny", "hafs-tiny-dpo"):
        finished(hafs("sync", "pull", model, "--node", "box"))
        pulled, there = home / "models" / model / "v1", tmp_path / "node" / "models" / model / "v1"
        for name in ("adapter.gguf", "metrics.jsonl", "training_stats.json", "adapter/adapter_model.safetensors"):
            assert (pulled / name).read_bytes() == (there / name).read_bytes()
    assert finished(hafs("chat", "hafs-tiny", "--node", "box", "--prompt", "What does LDA #$10 do?")).strip()

    sshd.new_host_key()
    changed = finished(hafs("train", "status", "--node", "box"), 32)
    assert "has changed" in changed
    assert changed.count("SHA256:") == 2
    assert "box" in finished(hafs("status")), "one node that is refused must not hide the rest"
