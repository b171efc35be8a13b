"""Our own known_hosts: one pinned key a host, `host type base64` a line. A key on record is never replaced from here."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from config.errors import ConfigError, HostKeyRefused
from config.files import write_atomic

SSH_PORT = 22


@dataclass(frozen=True)
class HostKey:
    """A public key as known_hosts writes it. `host` is `name`, or `[name]:port` where the port is not 22."""

    host: str
    type: str
    base64: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        digest = hashlib.sha256(base64.b64decode(self.base64)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def line(self) -> str:
        return f"{self.host} {self.type} {self.base64}"


def host_label(host: str, port: int) -> str:
    """The name of a host in known_hosts."""
    return host if port == SSH_PORT else f"[{host}]:{port}"


def known_keys(path: Path) -> dict[str, HostKey]:
    """The pinned keys by host. Raises ConfigError naming the line that cannot be read."""
    if not path.exists():
        return {}
    keys: dict[str, HostKey] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _parsed(line, f"{path}:{number}")
        if key.host in keys:
            raise ConfigError(f"{path}:{number}: a second key for {key.host}", hint="keep the line you trust, remove the other")
        keys[key.host] = key
    return keys


def pin(path: Path, key: HostKey) -> None:
    """Add `key`. Raises HostKeyRefused where another key is on record for that host; the same key again is no change."""
    known = known_keys(path)
    if key.host in known:
        require_same(path, known[key.host], key)
        return
    write_atomic(path, "".join(f"{entry.line}\n" for entry in [*known.values(), key]).encode())


def unpin(path: Path, host: str) -> None:
    """Forget the key of `host`. Raises ConfigError where the file cannot be read."""
    known = known_keys(path)
    if known.pop(host, None):
        write_atomic(path, "".join(f"{entry.line}\n" for entry in known.values()).encode())


def require_same(path: Path, pinned: HostKey, offered: HostKey, name: str = "NAME") -> None:
    """Raises HostKeyRefused with both fingerprints where the keys differ. `name`: of the node, as far as it is known."""
    if (pinned.type, pinned.base64) == (offered.type, offered.base64):
        return
    raise HostKeyRefused(
        f"the host key of {offered.host} has changed: pinned {pinned.type} {pinned.fingerprint}, "
        f"offered {offered.type} {offered.fingerprint}",
        hint=f"someone may be in between. Only if you know why it changed: remove the line of {pinned.host} from {path} "
        f"and trust the new key: hafs nodes trust {name}",
    )


def unknown(name: str, key: HostKey) -> HostKeyRefused:
    """The error that shows a key nobody has looked at yet."""
    return HostKeyRefused(
        f"the host key of {key.host} is not known yet: {key.type} {key.fingerprint}",
        hint=f"compare it with `ssh-keygen -lf` on that machine, then run: hafs nodes trust {name}",
    )


def _parsed(line: str, where: str) -> HostKey:
    """A line of OpenSSH's known_hosts says more: patterns, lists, hashed names, markers. None of it would match here."""
    fields = line.split()
    try:
        host, kind, blob = fields[:3]
        named, _, *_ = _fields(base64.b64decode(blob, validate=True))
        if re.search(r"[@|*?!,]", host) or named != kind.encode():
            raise ValueError(host)
    except (ValueError, binascii.Error) as error:
        hint = "one plain host a line; remove the line and trust the node again: hafs nodes trust NAME"
        raise ConfigError(f"{where}: not `host type base64`", hint=hint) from error
    return HostKey(host, kind, blob)


def _fields(key: bytes) -> list[bytes]:
    """What a public key is made of, its type first (RFC 4253, 6.6). Raises ValueError where it is cut short."""
    found = []
    while key:
        end = 4 + int.from_bytes(key[:4], "big")
        if end > len(key):
            raise ValueError("cut short")
        found.append(key[4:end])
        key = key[end:]
    return found
