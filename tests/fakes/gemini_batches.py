"""Gemini's batch and file API, and its online one, as a process of its own: what is created outlives a client that is killed.

    python -m tests.fakes.gemini_batches PORT_FILE

It listens on a free loopback port and writes it to PORT_FILE. An answer repeats its prompt; a prompt with the word "wrong" gets
the error 3 in a batch, "busy" the error 14, "lost" no line at all. Answers come in another order than requests.

POST /control sets what the server does next (see `Control`); POST /end ends all jobs. GET /witness tells what it saw: jobs in
order of creation, how often each display name was created, and how often each prompt was billed, by batch and online.
"""

import asyncio
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.fakes.served import serve

Json = dict[str, Any]
PAGE = 2  # jobs a page, however many are asked for


@dataclass
class Control:
    hold_create: bool = False  # create the job, and answer only when this is False again
    drop_create: int = 0  # create the job and hang up, so many times
    refuse_create: int = 0  # create none and answer 429, so many times
    refuse_upload: int = 0  # answer 503, so many times
    hide: int = 0  # leave the jobs out of so many lists
    fail_polls: int = 0  # answer 503 to so many looks at a job
    polls: int = 2  # looks at a job until it ends; 0: it ends when told
    end: str = "SUCCEEDED"  # how jobs end
    heeds_cancel: bool = False
    reply: Json = field(default_factory=dict)  # merged into every answer


@dataclass
class Job:
    name: str
    display_name: str
    model: str
    lines: list[Json]
    state: str = "PENDING"
    polls: int = 0
    cancelled: bool = False
    file: str = ""


class Server:
    def __init__(self) -> None:
        self.control = Control()
        self.changed = asyncio.Event()
        self.jobs: list[Job] = []
        self.files: dict[str, bytes] = {}
        self.created: Counter[str] = Counter()
        self.billed: Counter[str] = Counter()
        self.online: Counter[str] = Counter()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/control", self.set_control),
            web.post("/end", self.end_all),
            web.get("/witness", self.witness),
            web.post("/upload/v1beta/files", self.start_upload),
            web.post("/upload/{file}", self.upload),
            web.get("/v1beta/files/{file}", self.download),
            web.get("/v1beta/models", self.models),
            web.post("/v1beta/models/{call}", self.call_model),
            web.get("/v1beta/batches", self.list),
            web.get("/v1beta/batches/{id}", self.get),
            web.post("/v1beta/batches/{id}", self.cancel),
        ]

    # --- for the test ------------------------------------------------------------------------------------------------

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            assert hasattr(self.control, name), name
            setattr(self.control, name, value)
        self.changed.set()
        self.changed = asyncio.Event()

    async def set_control(self, request: web.Request) -> web.Response:
        self.set(**await request.json())
        return web.json_response({})

    async def end_all(self, request: web.Request) -> web.Response:
        """All jobs end now, as `control.end` says."""
        for job in self.jobs:
            self.finish(job)
        return web.json_response({})

    async def witness(self, _: web.Request) -> web.Response:
        jobs = [
            {key: value for key, value in asdict(job).items() if key != "lines"} | {"requests": job.lines} for job in self.jobs
        ]
        seen = {"created": self.created, "billed": self.billed, "online": self.online}
        return web.json_response({"jobs": jobs, **seen, "control": asdict(self.control)})

    def spend(self, name: str) -> bool:
        """Whether a fault that is counted happens now."""
        left = getattr(self.control, name)
        setattr(self.control, name, max(0, left - 1))
        return bool(left)

    # --- files -------------------------------------------------------------------------------------------------------

    async def start_upload(self, request: web.Request) -> web.Response:
        if self.spend("refuse_upload"):
            return refusal(503, "UNAVAILABLE")
        name = f"in{len(self.files)}"
        self.files[name] = b""
        return web.json_response({}, headers={"X-Goog-Upload-URL": f"http://{request.host}/upload/{name}"})

    async def upload(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        self.files[name] += await request.read()
        final = "finalize" in request.headers["X-Goog-Upload-Command"]
        body = {"file": {"name": f"files/{name}", "mimeType": "jsonl"}} if final else {}
        return web.json_response(body, headers={"X-Goog-Upload-Status": "final" if final else "active"})

    async def download(self, request: web.Request) -> web.Response:
        name = request.match_info["file"].removesuffix(":download")
        return web.Response(body=self.files[name]) if name in self.files else refusal(404, "NOT_FOUND")

    # --- models and jobs ---------------------------------------------------------------------------------------------

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": "models/gemini-2.5-flash"}]})

    async def call_model(self, request: web.Request) -> web.Response:
        model, _, verb = request.match_info["call"].partition(":")
        body = await request.json()
        if verb == "generateContent":
            self.online[prompt_of(body)] += 1
            return web.json_response(answer_to(body, {}))
        assert verb == "batchGenerateContent", verb
        return await self.create(request, model, body["batch"])

    async def create(self, request: web.Request, model: str, batch: Json) -> web.Response:
        if self.spend("refuse_create"):
            return refusal(429, "RESOURCE_EXHAUSTED")
        lines = self.files[batch["inputConfig"]["fileName"].removeprefix("files/")].splitlines()
        job = Job(f"batches/{len(self.jobs)}", batch["displayName"], model, [json.loads(line) for line in lines])
        self.jobs.append(job)
        self.created[job.display_name] += 1
        while self.control.hold_create:
            await self.changed.wait()
        if self.spend("drop_create"):
            assert request.transport is not None
            request.transport.close()
        return web.json_response(operation(job))

    async def list(self, request: web.Request) -> web.Response:
        jobs = [] if self.spend("hide") else self.jobs[::-1]  # the newest first
        start = int(request.query.get("pageToken") or 0)
        page: Json = {"operations": [operation(job) for job in jobs[start : start + PAGE]]}
        if start + PAGE < len(jobs):
            page["nextPageToken"] = str(start + PAGE)
        return web.json_response(page)

    async def get(self, request: web.Request) -> web.Response:
        job = next((job for job in self.jobs if job.name == f"batches/{request.match_info['id']}"), None)
        if job is None:
            return refusal(404, "NOT_FOUND")
        if self.spend("fail_polls"):
            return refusal(503, "UNAVAILABLE")
        job.polls += 1
        if self.control.polls and job.polls >= self.control.polls:
            self.finish(job)
        return web.json_response(operation(job))

    async def cancel(self, request: web.Request) -> web.Response:
        name = request.match_info["id"].removesuffix(":cancel")
        job = next(job for job in self.jobs if job.name == f"batches/{name}")
        job.cancelled = True
        if self.control.heeds_cancel and job.state == "PENDING":
            job.state = "CANCELLED"
        return web.json_response({})

    def finish(self, job: Job) -> None:
        if job.state != "PENDING":
            return
        job.state = self.control.end
        if job.state != "SUCCEEDED":
            return
        answers = [line for line in map(self.answered, reversed(job.lines)) if line is not None]
        job.file = f"out{len(self.files)}"
        self.files[job.file] = b"".join(json.dumps(answer).encode() + b"\n" for answer in answers)

    def answered(self, line: Json) -> Json | None:
        prompt = prompt_of(line["request"])
        for word, code in (("wrong", 3), ("busy", 14)):
            if word in prompt:
                return {"key": line["key"], "error": {"code": code, "message": f"this one is {word}"}}
        if "lost" in prompt:
            return None
        self.billed[prompt] += 1
        return {"key": line["key"], "response": answer_to(line["request"], self.control.reply)}


def refusal(status: int, name: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": name.lower(), "status": name}}, status=status)


def operation(job: Job) -> Json:
    output = {"output": {"responsesFile": f"files/{job.file}"}} if job.file else {}
    state = {"displayName": job.display_name, "model": f"models/{job.model}", "state": f"BATCH_STATE_{job.state}"}
    return {"name": job.name, "done": job.state != "PENDING", "metadata": {**state, "aFieldOfTomorrow": 1, **output}}


def prompt_of(body: Json) -> str:
    return str(body["contents"][-1]["parts"][-1]["text"])


def answer_to(body: Json, more: Json) -> Json:
    candidate = {"content": {"role": "model", "parts": [{"text": f"on {prompt_of(body)}"}]}, "finishReason": "STOP", "index": 0}
    counted = {"promptTokenCount": 20, "candidatesTokenCount": 3, "thoughtsTokenCount": 5, "cachedContentTokenCount": 4}
    return {"candidates": [candidate], "usageMetadata": counted, "aFieldOfTomorrow": {"x": 1}, **more}


async def main(port_file: Path) -> None:
    app = web.Application(client_max_size=2**30)
    app.add_routes(Server().routes())
    await serve(app, port_file)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
