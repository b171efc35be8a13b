"""A base from the Hugging Face hub: fetched once into the hub's own cache folder, where every other program finds it, too.

- What is in the cache is used as it is, without a word on the network. A revision that names no commit is looked up when its file
  is fetched; from then on it stands for that commit on this machine.
- Of a whole repository come the files that describe and hold the model, never code and no second copy of the weights. The weights
  come last: where they are whole in the cache, everything is.
- What a repository calls its files is a stranger's word: only plain names become files here, on every system.
- A file has its name only when it is whole, and its hash is the one that the hub told.
- A fetch that was cut off goes on at the byte where it stopped, in the next attempt too. (huggingface_hub 2 begins anew.)
- Endpoint, cache folder and token are huggingface_hub's (HF_ENDPOINT, HF_HOME, HF_TOKEN); a token may also be in keys.toml.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from config.contracts.base_name import COMMIT, HubFile, is_plain
from config.errors import AuthFailed, ConfigError, DiskFull, ModelMissing, ProviderUnavailable, translate_os_errors
from config.files import replace, sync_folder, write_atomic
from config.locks import FileLock
from config.settings import load_settings

TIMEOUT_S = 20.0  # without a byte
TRIES = 5  # in a row that bring no byte; the wait between them doubles
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 10.0
SHA256_DIGITS = 64
MAX_REDIRECTS = 5
MAIN = "main"
SPARE_BYTES = 2**28  # of the disk, left to others
ON_NODE = "on the node: hf auth login, or HF_TOKEN in its environment or in the [keys] of {keys}"

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
WEIGHTS = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors")

R = TypeVar("R")
Told = Callable[[int, int], None]

log = logging.getLogger("hafs")


class Remote(NamedTuple):
    """What the hub says of a file. `etag` is its SHA-256, of a file that git itself keeps git's hash."""

    commit: str
    etag: str
    size: int


def offline_wanted(environment: Mapping[str, str]) -> bool:
    """Whether a person has told the libraries of the hub to ask nothing of the network."""
    told = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in ("1", "ON", "YES", "TRUE")


def cached(file: HubFile) -> Path | None:
    """The file, or the folder of a whole repository, where it is in the cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    if not file.file:
        folder = _snapshots(file) / _cached_commit(file)
        return folder if _is_whole(folder) else None
    found = try_to_load_from_cache(file.repo, file.file, cache_dir=constants.HF_HUB_CACHE, revision=file.revision or None)
    return Path(found) if isinstance(found, str) else None


def _cached_commit(file: HubFile) -> str:
    """What the revision stands for on this machine; a commit stands for itself."""
    named = _snapshots(file).parent / "refs" / (file.revision or MAIN)
    if re.fullmatch(COMMIT, file.revision) or not named.is_file():
        return file.revision or MAIN
    return named.read_text().strip()


def _is_whole(folder: Path) -> bool:
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    index = folder / INDEX
    if not index.is_file():
        return (folder / SINGLE).is_file()
    try:
        shards = {Path(shard).name for shard in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):  # a repository's own mistake: `fetch` says so
        return False
    return all((folder / shard).is_file() for shard in shards)


def pin(file: HubFile, *, offline: bool) -> HubFile:
    """The same file, or repository, at the commit that its revision means: the cached one's, else the hub's.

    Raises:
        AuthFailed, ModelMissing, ProviderUnavailable: as `fetch`.
        ConfigError: it is not in the cache, and `offline` forbids to ask.
    """
    found = cached(file)
    if found is not None:
        return file._replace(revision=found.relative_to(_snapshots(file)).parts[0])
    _require_online(file, offline)
    with _client() as client:
        commit = _look(client, file).commit if file.file else _listing(client, file)[0]
    if file.revision != commit:
        write_atomic(_snapshots(file).parent / "refs" / (file.revision or MAIN), commit.encode())  # as huggingface_hub does
    return file._replace(revision=commit)


def fetch(file: HubFile, told: Told, wait: Callable[[Callable[[], str]], None], *, offline: bool) -> Path:
    """Bring a pinned file, or what of a pinned repository is needed, into the cache, and return it.

    Args:
        told: told bytes and bytes in all, after each piece; what it raises ends the fetch, which another one goes on with.
        wait: calls its argument again and again until it returns "": it returns what is waited for.

    Raises:
        ModelMissing: no such repository, revision or file; a repository without safetensors, or without all of them.
        AuthFailed: the repository is gated or private, and the token does not open it.
        ProviderUnavailable: the hub cannot be reached, or what came is not what it said.
        DiskFull, StoreError: the cache folder cannot take it.
        ConfigError: `offline` forbids to ask.
    """
    _require_online(file, offline)
    with _client() as client:
        if file.file:
            return _fetch_file(client, file, _look(client, file), told, wait)
        names = _needed(file, _listing(client, file)[1])
        files = [file._replace(file=name) for name in names]
        remotes = [(each, _look(client, each)) for each in files if cached(each) is None]
        done, total = 0, sum(remote.size for _, remote in remotes)
        with translate_os_errors(_snapshots(file)):
            _snapshots(file).mkdir(parents=True, exist_ok=True)
            _require_space(file, _snapshots(file), sum(_missing(each, remote) for each, remote in remotes))
        for each, remote in remotes:
            _fetch_file(client, each, remote, partial(_told_of_all, told, done, total), wait)
            done += remote.size
    folder = _snapshots(file) / file.revision
    if not _is_whole(folder):
        hint = f"look at {_page(file)}: it may still be uploaded; or take another repository"
        raise ModelMissing(f"{file.repo} is no whole model: its {INDEX} names files that it does not have", hint=hint)
    return folder


def _told_of_all(told: Told, before: int, total: int, done: int, _: int) -> None:
    told(before + done, total)


def _fetch_file(
    client: httpx.Client, file: HubFile, remote: Remote, told: Told, wait: Callable[[Callable[[], str]], None]
) -> Path:
    part = _part(file, remote)
    lock = FileLock(part.with_suffix(".lock"))
    wait(lambda: "" if lock.acquire() else f"{file.file}, which another job fetches")
    try:
        return cached(file) or _download(client, file, remote, part, told)
    finally:
        lock.release()


def _part(file: HubFile, remote: Remote) -> Path:
    return _snapshots(file).parent / "blobs" / f"{remote.etag}.part"


def _missing(file: HubFile, remote: Remote) -> int:
    """Bytes that have yet to come."""
    part = _part(file, remote)
    return remote.size - (part.stat().st_size if part.exists() else 0)


def _listing(client: httpx.Client, file: HubFile) -> tuple[str, list[str]]:
    """The commit of a repository's revision, and the names of its files there."""
    url = f"{_endpoint()}/api/models/{file.repo}/revision/{file.revision or MAIN}"

    def ask() -> tuple[str, list[str]]:
        with _translated(url):
            answer = client.get(url, follow_redirects=True)
            _require_ok(client, file, answer)
            said = answer.json()
            names = [str(entry["rfilename"]) for entry in said["siblings"]]
            if not re.fullmatch(COMMIT, str(said["sha"])):
                raise ValueError("no commit")
            return str(said["sha"]), names

    return _patiently(ask)


def _needed(file: HubFile, names: list[str]) -> list[str]:
    """What is fetched of a repository: descriptions first, the weights last. Raises ModelMissing."""
    inside = sorted(name for name in names if is_plain(name))
    shards = [name for name in inside if WEIGHTS.fullmatch(name) and name != SINGLE]
    weights = shards if INDEX in inside and shards else [SINGLE] if SINGLE in inside else []
    if not weights or CONFIG not in inside or not set(TOKENIZERS) & set(inside):
        told = f"{file.repo} is no whole model in safetensors: it needs {CONFIG}, {' or '.join(TOKENIZERS)}, and {SINGLE}"
        raise ModelMissing(f"{told}, or its parts with their {INDEX}", hint=_offers(file, names))
    return [name for name in inside if name.endswith((".json", ".jinja")) or name == "tokenizer.model"] + weights


def _snapshots(file: HubFile) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{file.repo.replace('/', '--')}" / "snapshots"


def _client() -> httpx.Client:
    from huggingface_hub import get_token

    token = (load_settings().key("HF_TOKEN") or get_token() or "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):  # httpx would repeat it in its complaint
        raise AuthFailed(
            "the HF_TOKEN of this node has blanks or letters that no token has", hint=f"set another one {_set_token()}"
        )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(headers={**headers, "Accept-Encoding": "identity"}, timeout=TIMEOUT_S)


def _look(client: httpx.Client, file: HubFile) -> Remote:
    """Ask the hub, which answers for the file or says where it is stored; only its own redirects (a new name) are followed."""

    def ask(url: str) -> httpx.Response:
        with _translated(url):
            answer = client.head(url)
            _require_ok(client, file, answer)
            return answer

    answer = _patiently(lambda: ask(_url(file)))
    for _ in range(MAX_REDIRECTS):
        there = answer.headers.get("Location", "")
        if not there.startswith("/") or there.startswith("//"):  # another host: the token is not for it
            break
        answer = _patiently(partial(ask, str(answer.url.join(there))))
    said = answer.headers
    etag = (said.get("X-Linked-Etag") or said.get("ETag", "")).removeprefix("W/").strip('"')
    size = said.get("X-Linked-Size") or said.get("Content-Length", "")
    commit = said.get("X-Repo-Commit", "")
    if not (commit.isalnum() and etag.isalnum() and size.isdecimal()):
        raise ProviderUnavailable(f"{_url(file)}: not an answer of the hub", hint="is HF_ENDPOINT right, or a proxy in between?")
    return Remote(commit, etag, int(size))


def _download(client: httpx.Client, file: HubFile, remote: Remote, part: Path, told: Told) -> Path:
    target = _snapshots(file) / remote.commit / file.file
    with translate_os_errors(part):
        for folder in (part.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        _require_space(file, part.parent, _missing(file, remote))
        _receive(client, file, remote, part, told)
        if _digest(part, remote.etag) != remote.etag:
            part.unlink()
            raise ProviderUnavailable(f"{file}: what came is not what the hub said", hint="it is fetched anew")
        replace(part, target)
        sync_folder(target.parent)
    return target


def _receive(client: httpx.Client, file: HubFile, remote: Remote, part: Path, told: Told) -> None:
    """Append until the part is whole."""
    with part.open("ab") as output:
        told(output.tell(), remote.size)
        while output.tell() < remote.size:
            _patiently(lambda: _append(client, file, remote, output, told))
        output.flush()
        os.fsync(output.fileno())


def _append(client: httpx.Client, file: HubFile, remote: Remote, output: IO[bytes], told: Told) -> None:
    """Receive from where `output` ends. A connection that ends after some bytes is no error; one that brings none is."""
    begin = output.tell()
    url, headers = _url(file), {"Range": f"bytes={begin}-"} if begin else {}
    try:
        with _translated(url), client.stream("GET", url, headers=headers, follow_redirects=True) as answer:
            _require_ok(client, file, answer)
            if begin and answer.status_code != 206:  # the whole file, whatever was asked
                output.seek(0)
                output.truncate()
            for piece in answer.iter_raw():
                output.write(piece)
                told(output.tell(), remote.size)
    except ProviderUnavailable:
        if output.tell() <= begin:
            raise


def _patiently(ask: Callable[[], R]) -> R:
    """Ask again, a few times, where the hub does not answer or is overloaded."""
    again = Retrying(
        retry=retry_if_exception_type(ProviderUnavailable),
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential_jitter(initial=FIRST_WAIT_S, max=MAX_WAIT_S),
        before_sleep=lambda state: log.warning("%s; trying again", state.outcome and state.outcome.exception()),
        reraise=True,
    )
    return again(ask)


def _url(file: HubFile) -> str:
    return f"{_page(file)}/resolve/{file.revision or MAIN}/{file.file}"


def _require_online(file: HubFile, offline: bool) -> None:
    if offline:
        hint = "unset HF_HUB_OFFLINE on the node, or bring the file there and give its path"
        raise ConfigError(f"{file} is not in the cache of this node, which is told to be offline", hint=hint)


def _require_space(file: HubFile, folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing + SPARE_BYTES > free:
        raise DiskFull(
            f"{file} needs {missing / 1e9:.1f} GB more in {folder}, {free / 1e9:.1f} GB are free",
            hint="free some space on the node, or set HF_HOME there to a larger disk; what has come is kept",
        )


def _require_ok(client: httpx.Client, file: HubFile, answer: httpx.Response) -> None:
    """Raises what `fetch` does. Of an address nothing behind the path is told: there are signatures."""
    if answer.is_success or answer.is_redirect:
        return
    code, where = answer.headers.get("X-Error-Code", ""), answer.url.copy_with(query=None, fragment=None)
    said = f"{answer.status_code} {answer.headers.get('X-Error-Message', '')}".strip()
    if code == "GatedRepo":
        hint = f"accept its licence at {_page(file)}, and set the token of that account {_set_token()}; then: hafs train retry"
        raise AuthFailed(f"{file.repo} is gated, and this node may not read it: {said}", hint=hint)
    if code == "RepoNotFound":
        hint = f"look for it at {_page(file)}; a private one needs a token {_set_token()}"
        raise ModelMissing(f"no repository {file.repo} that this node can see: {said}", hint=hint)
    if code == "RevisionNotFound":
        hint = f"its branches and tags are at {_page(file)}/tree/main"
        raise ModelMissing(f"{file.repo} has no revision {file.revision or MAIN}", hint=hint)
    if code == "EntryNotFound":
        raise ModelMissing(f"{file.repo} has no file {file.file} at {file.revision or MAIN}", hint=_offered(client, file))
    if answer.status_code in (401, 403) and str(answer.url).startswith(_endpoint()):  # of a storage: the signature is too old
        raise AuthFailed(f"the hub refuses this node's token: {said}", hint=f"set another one {_set_token()}")
    raise ProviderUnavailable(f"{answer.request.method} {where}: {said}", hint="try again later; what has come is kept")


def _offered(client: httpx.Client, file: HubFile) -> str:
    """What can be taken instead of a file that is not there."""
    url = f"{_endpoint()}/api/models/{file.repo}/revision/{file.revision or MAIN}"
    with _translated(url):
        answer = client.get(url)
        return _offers(file, [str(entry["rfilename"]) for entry in answer.json()["siblings"]] if answer.is_success else [])


def _offers(file: HubFile, names: list[str]) -> str:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"it has: {', '.join(ggufs[:8])}{', …' if len(ggufs) > 8 else ''}"
    if any(WEIGHTS.fullmatch(name) for name in names):
        return f"it has no GGUF file; for the whole repository with its safetensors write hf:{file.repo}"
    return f"it has no GGUF file and no safetensors: look for one that has, often {file.repo}-GGUF"


def _page(file: HubFile) -> str:
    return f"{_endpoint()}/{file.repo}"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _set_token() -> str:
    return ON_NODE.format(keys=load_settings().keys_file)


def _digest(path: Path, etag: str) -> str:
    """The hash of a file, of the kind that `etag` is."""
    with path.open("rb") as file:
        if len(etag) == SHA256_DIGITS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        seen = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)  # as git names a file
        return hashlib.file_digest(file, lambda: seen).hexdigest()


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise ProviderUnavailable(
            f"{url}: {error or type(error).__name__}",
            hint="has the node a way to the network? without one, bring the file there and give its path",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ProviderUnavailable(f"{url}: not an answer of the hub ({error})", hint="is HF_ENDPOINT right?") from error
