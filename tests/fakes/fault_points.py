"""The fault points that are written in the modules of the node which change something for good."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = (
    "config/files.py",
    "trainer_node/daemon.py",
    "trainer_node/database.py",
    "trainer_node/events.py",
    "trainer_node/inbox.py",
    "trainer_node/jobdir.py",
    "trainer_node/leases.py",
    "trainer_node/logs.py",
    "trainer_node/processes.py",
    "trainer_node/queue.py",
    "trainer_node/refusals.py",
    "trainer_node/rpc.py",
    "trainer_node/runner.py",
    "trainer_node/train/checkpoints.py",
)
OF_MODELS = ("trainer_node/aliases.py", "trainer_node/registry.py")  # no job comes to these: see the tests of the aliases


def fault_points(modules: tuple[str, ...] = MODULES) -> list[str]:
    """The names, as often as they are written: of `around("…")`, and `commit.…` of `transaction("…")`."""
    found = []
    for module in modules:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name == "around":
                    found.append(str(node.args[0].value))
                elif name == "transaction":
                    found.append(f"commit.{node.args[0].value}")
    return found
