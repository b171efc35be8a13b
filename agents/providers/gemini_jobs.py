"""Gemini's batch API: one call of the server each, errors translated as everywhere.

Requests travel as an uploaded file and answers as a file too, each line with its key: the server does not keep inline answers in
order, nor always hand the metadata of inline requests back (https://github.com/googleapis/python-genai/issues/1909 and 2008).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from google import genai
from google.genai import errors, types

from agents.addresses import at_home
from agents.providers.batch_journal import Json, parse_answers
from agents.providers.gemini import NETWORK_HINT, GeminiProvider, Part
from agents.providers.transport import SILENCE_S, clip, hide, open_session, translate_transport_errors
from agents.providers.wire import Refusal
from agents.task import Completion, Sampling, Usage
from config.errors import BadRequest, ProviderError, ProviderUnavailable

_PAGE = 100
# "This request is wrong", as google.rpc and as HTTP say it: INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, OUT_OF_RANGE, …
_WRONG = frozenset({3, 5, 7, 9, 11, 12, 16, 400, 401, 403, 404, 501})


@dataclass(frozen=True)
class Job:
    """A batch on the server. `file` holds its answers; a job that was cancelled or expired may have some too."""

    state: str
    ended: bool
    file: str = ""


class BatchJobs(GeminiProvider):
    """The jobs of one key, beside what it does online. Every method raises what `Provider.generate` raises."""

    _session: aiohttp.ClientSession | None = None

    @cached_property
    def _client(self) -> genai.Client:
        # Made with the first call: the session belongs to the running event loop. With a session of one's own the SDK sends over
        # aiohttp directly; retry_options keep it from trying again by itself after a connection error.
        self._session = open_session(trust_env=not self._base_url or not at_home(urlsplit(self._base_url).hostname or ""))
        options = types.HttpOptions(
            api_version="v1beta",
            base_url=self._base_url or None,
            async_client_args={"allow_redirects": False},
            timeout=round(1000 * SILENCE_S),
            aiohttp_client=self._session,
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        return genai.Client(api_key=self._key, vertexai=False, http_options=options)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translate_transport_errors(self.host, NETWORK_HINT, self._key):
                yield
        except errors.APIError as error:
            code = error.code if isinstance(error.code, int) else 500
            headers = getattr(error.response, "headers", None) or {}
            told = str(error.message or error.status or error.code)
            raise self._refused(Refusal(code, headers, error.details, told)) from None
        except (ValueError, TypeError, AttributeError) as error:
            # No JSON (a proxy's page), or of a shape that the SDK stumbles over.
            what = clip(str(error), self._key)
            raise ProviderUnavailable(f"{self.host} does not answer as Gemini does: {what}") from None

    async def upload(self, lines: Path) -> str:
        """Send a file of requests; returns its name there. The server removes it after two days."""
        try:
            with self._translated():
                file = await self._client.aio.files.upload(file=lines, config=types.UploadFileConfig(mime_type="jsonl"))
        except KeyError as error:  # the SDK's word for an answer without an address to send to, or without a file
            raise ProviderUnavailable(f"{self.host} takes no file: {error}", billable=False) from None
        if not file.name:
            raise ProviderUnavailable(f"{self.host} did not name the file that it was sent", billable=False)
        return file.name

    async def create(self, model: str, file: str, display_name: str) -> str:
        """Start a job; returns the server's name for it."""
        with self._translated():
            config = types.CreateBatchJobConfig(display_name=display_name)
            job = await self._client.aio.batches.create(model=model, src=file, config=config)
        if not job.name:
            raise ProviderUnavailable(f"{self.host} did not name the batch {display_name}")
        return job.name

    async def find(self, display_name: str) -> str:
        """The server's name of a job; empty where its list, read to the end, does not have it (yet)."""
        with self._translated():
            async for job in await self._client.aio.batches.list(config=types.ListBatchJobsConfig(page_size=_PAGE)):
                if job.display_name == display_name and job.name:
                    return job.name
        return ""

    async def look(self, name: str) -> Job:
        with self._translated():
            job = await self._client.aio.batches.get(name=name)
        file = job.dest.file_name if job.dest else None
        return Job(job.state.name if job.state else "", job.done, file or "")

    async def fetch(self, file: str) -> bytes:
        """The answers of a job: JSON lines with `key` and `response` or `error`."""
        with self._translated():
            lines = await self._client.aio.files.download(file=file)
            parse_answers(lines)  # what is no JSON raises here, and is fetched again
        # They are kept on the disk for a while, and an error may repeat the key.
        return b"\n".join(line if b'"response"' in line else self._hidden(line) for line in lines.splitlines())

    async def cancel(self, name: str) -> None:
        with self._translated():
            await self._client.aio.batches.cancel(name=name)

    def completion(self, line: Json, model: str, sampling: Sampling, latency_s: float) -> Completion:
        """What a line of answers says.

        Raises:
            BadRequest: the server says that this request is wrong.
            ProviderUnavailable: it failed at this request, or its answer is not whole.
        """
        if "response" not in line:
            raise self._refusal(line.get("error"))
        with self._translated():
            return self.completed([Part.model_validate(line["response"])], model, sampling, latency_s)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._client.aio.aclose()
            await self._session.close()
        await super().aclose()

    def _hidden(self, line: bytes) -> bytes:
        return hide(line.decode(errors="replace"), self._key).encode()

    def _refusal(self, error: object) -> ProviderError:
        status = error if isinstance(error, dict) else {}
        told = status.get("message") or status.get("code")
        what = clip(f"{self.host} did not answer one request of a batch: {told}", self._key)
        return BadRequest(what) if status.get("code") in _WRONG else ProviderUnavailable(what, billable=False)


def usage(line: Json) -> Usage:
    """The tokens that an answer was billed for."""
    return Part.model_validate(line["response"]).usage
