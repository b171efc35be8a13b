"""Calls and their rows as a campaign makes them, for tests of its files."""

from campaigns.seen import answer_id
from campaigns.spec import CampaignSpec
from campaigns.store import Call, CampaignFiles, Rejected, Store
from config.contracts.sample import Message, Provenance, Sample
from config.settings import load_settings

LANE = {"provider": "ollama", "model": "m", "host": "h"}
VERDICTS = ("accepted", "rejected", "failed")


def spec(**changes: object) -> CampaignSpec:
    return CampaignSpec.model_validate({"name": "x", "target": 9, "domains": {"asm": 1}, "lanes": {"l": LANE}, **changes})


def files() -> CampaignFiles:
    return CampaignFiles(load_settings(), "x")


def store(**changes: object) -> Store:
    return Store(files(), spec(**changes), "1")


def call(number: int, verdict: str = "accepted") -> Call:
    return Call(
        task_id=f"t{number}",
        domain="asm",
        cell="a",
        number=number,
        verdict=verdict,
        reason="" if verdict == "accepted" else "flags",
        answer=answer_id("s", f"c{number}") if verdict == "accepted" else "",
        lane="l",
        cost_usd=0.5,
    )


def row(number: int, verdict: str = "accepted", size: int = 0) -> Sample | Rejected | None:
    made = Provenance(campaign="x", task_id=f"t{number}", cell="a", number=number, lane="l", cost_usd=0.5)
    asked = [Message(role="user", content="q" * size)]
    sample = Sample(id=f"t{number}", domain="asm", source_id="s", messages=asked, completion=f"c{number}", provenance=made)
    if verdict == "rejected":
        return Rejected.model_validate({**sample.model_dump(), "reason": "flags"})
    return sample if verdict == "accepted" else None


async def append(opened: Store, number: int, verdict: str = "accepted") -> None:
    await opened.append(call(number, verdict), row(number, verdict))
