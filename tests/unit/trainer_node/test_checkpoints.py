"""Only what is whole is resumed from, and no step is written twice."""

from pathlib import Path

import pytest

from config.contracts.job import Metrics
from trainer_node.train.checkpoints import is_complete, newest_complete, remove_after, seal, step_of
from trainer_node.train.loop import LIKE, LengthOrder
from trainer_node.train.metrics import cut_after, read_metrics


def checkpoint(folder: Path, step: int, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "ref").mkdir(parents=True)
    (path / "adapter.bin").write_bytes(bytes([step]) * 100)
    (path / "ref" / "adapter.bin").write_bytes(b"frozen")
    if sealed:
        seal(path)
    return path


def test_a_sealed_folder_is_complete(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1, sealed=False)
    assert not is_complete(path)
    seal(path)
    assert is_complete(path)
    assert not is_complete(tmp_path / "missing")


@pytest.mark.parametrize("damage", ["cut", "changed", "deleted", "below", "seal"])
def test_any_damage_makes_it_incomplete(tmp_path: Path, damage: str) -> None:
    path = checkpoint(tmp_path, 1)
    file = path / "adapter.bin"
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:50])
        case "changed":
            file.write_bytes(b"\0" * 100)
        case "deleted":
            file.unlink()
        case "below":
            (path / "ref" / "adapter.bin").write_bytes(b"thawed")
        case "seal":
            (path / "COMPLETE.json").write_text("{")
    assert not is_complete(path)


def test_torn_checkpoints_are_passed_over_and_removed(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 20)
    torn = checkpoint(tmp_path, 100, sealed=False)
    (tmp_path / "README.md").write_text("")
    assert newest_complete(tmp_path) == whole
    assert torn.exists(), "to look removes nothing"
    remove_after(tmp_path, step_of(whole))
    assert not torn.exists() and whole.exists()
    assert newest_complete(tmp_path / "nothing") is None and step_of(None) == 0


def test_metrics_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [Metrics(time=0, step=step, steps=9, epoch=0.1).model_dump_json() + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"time": 1, "st')
    cut_after(path, 3)
    assert [line.step for line in read_metrics(path)] == [1, 2, 3]
    cut_after(path, 0)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_order_is_by_seed_and_epoch_and_groups_lengths() -> None:
    lengths = [(number * 37) % 50 for number in range(103)]
    order = LengthOrder(lengths, 8, seed=3)
    first = list(order)
    assert sorted(first) == list(range(103))
    assert first == list(LengthOrder(lengths, 8, seed=3))
    order.set_epoch(1)
    assert list(order) != first
    spread = [max(part) - min(part) for start in range(0, 96, 8) if (part := [lengths[row] for row in first[start : start + 8]])]
    assert max(spread) < 2 * LIKE  # a batch may end one class of lengths and begin the next
