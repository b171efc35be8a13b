"""`hafs-node`: what runs on the trainer node. An error is one line and a hint on stderr, and an exit code of config.errors.

`rpc`, as the laptop calls it, does without what reads command lines: every connection waits for its first answer.
"""

import atexit
import gc
import sys
from pathlib import Path

from config import standard_output
from config.errors import HafsError, MissingExtra

INTERRUPTED = 130  # as a shell counts Ctrl-C


def main() -> None:
    """The entry point. Ctrl-C is exit code 130."""
    atexit.register(gc.freeze)  # else a last collection goes through all that was loaded, while the laptop may wait for the end
    words = sys.argv[1:]
    try:
        try:
            if words[:1] == ["rpc"] and (len(words) == 1 or (len(words) == 3 and words[1] == "--root")):
                _rpc(Path(words[2]) if len(words) == 3 else None)
            else:
                from trainer_node.commands import app

                standard_output.guard()
                app()
        except ModuleNotFoundError as error:
            raise MissingExtra(f"the package {error.name} is not installed", hint='pip install "hafs[node]"') from error
    except HafsError as error:
        sys.stderr.write(f"error: {error}\n" + (f"  {error.hint}\n" if error.hint else ""))
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def root_folder(root: Path | None) -> Path:
    """The node's folder: the one that was named, else that of this machine's settings."""
    if root is None:
        from config.settings import load_settings

        root = load_settings().node_root
    return root.expanduser().resolve()


def _rpc(root: Path | None) -> None:
    from trainer_node.rpc import serve_stdio

    serve_stdio(root_folder(root))


if __name__ == "__main__":
    main()
