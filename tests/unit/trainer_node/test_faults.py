"""Every operation of daemon, runner and rpc that cannot be undone stands between two fault points, with its name."""

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from config import faults
from tests.fakes.fault_points import MODULES, OF_MODELS, ROOT, fault_points

WRITES = {"write_atomic", "sync_folder", "fsync", "rename", "replace", "touch", "executescript"}
PROCESSES = {"Popen", "start_detached", "kill", "terminate", "kill_tree"}


def bare(path: Path) -> list[str]:
    """The durable operations of a module that stand in no `with around(…)`; its own functions have points inside."""
    found: list[str] = []
    tree = ast.parse(path.read_text())
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}

    def visit(node: ast.AST, covered: bool) -> None:
        if isinstance(node, ast.With):
            covered = covered or any("around" in ast.unparse(item.context_expr) for item in node.items)
        elif isinstance(node, ast.FunctionDef):
            covered = False
        elif isinstance(node, ast.Call) and is_durable(node) and not covered and ast.unparse(node.func) not in own:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}")
        for child in ast.iter_child_nodes(node):
            visit(child, covered)

    visit(tree, False)
    return found


def is_durable(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "replace" and isinstance(call.func, ast.Attribute):  # str.replace has two arguments, Path.replace one
        return ast.unparse(call.func.value) == "os" or len(call.args) == 1
    if name == "execute":
        return any(isinstance(arg, ast.Constant) and arg.value == "COMMIT" for arg in call.args)
    return name in WRITES | PROCESSES


@pytest.mark.parametrize("module", [*MODULES, *OF_MODELS])
def test_nothing_durable_happens_outside_of_two_points(module: str) -> None:
    assert bare(ROOT / module) == []


def test_the_search_finds_what_has_no_point(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "with around('x'):\n    os.replace(a, b)\n    def later():\n        child.kill()\n"
        "'a'.replace('b', 'c')\npath.replace(other)\nself._db.execute('COMMIT')\nself._db.execute('SELECT 1')\nos.fsync(3)\n"
    )
    assert [line.split(":")[1] for line in bare(path)] == ["4", "6", "7", "9"]


def test_a_name_belongs_to_one_place() -> None:
    names = fault_points((*MODULES, *OF_MODELS))
    assert len(names) > 20
    assert [name for name, times in Counter(names).items() if times > 1] == []


def test_the_nth_who_comes_there_is_killed_once(tmp_path: Path) -> None:
    program = "from config.faults import around\nfor n in range(3):\n    with around('x'): print(n, flush=True)"
    env = {**os.environ, faults.VARIABLE: f"x.after@2@{tmp_path}/latch x.before@9@{tmp_path}/other"}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [(run.returncode, run.stdout.split()) for run in runs] == [(-signal.SIGKILL, ["0", "1"]), (0, ["0", "1", "2"])]


def test_without_the_variable_a_point_is_nothing(tmp_path: Path) -> None:
    assert faults.around("x") is faults.around("y")
