"""Which node trains a job (`--node auto`): one that can, of these one that is free, of these one that has the data.

What a base needs is guessed from its name (…-7B): weights in 16 bits, a quarter more for LoRA and activations, and 2 GB. A base
whose name does not say is taken to fit any GPU.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from campaigns.sync.remote import Node, Question
from campaigns.sync.survey import ask_all, node_names
from config.contracts.manifest import Segment
from config.contracts.wire import GPU, HAVE, STATUS, HaveArgs, JobArgs, Nothing
from config.errors import HafsError, NodeUnreachable
from config.settings import Settings

ANSWER_S = 10.0
_PARAMETERS = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Offer:
    """What a node has for a job. `gpu_bytes`: the memory of its GPU, 0 for none; `missing_bytes`: packed data to be sent."""

    node: str
    gpu_bytes: int
    queued: int
    missing_bytes: int


@dataclass(frozen=True)
class Choice:
    """`why`: a sentence on the chosen node, and one on each other."""

    node: str
    why: list[str]


def choose_node(settings: Settings, base: str, segments: Sequence[Segment]) -> Choice:
    """Ask every node what it has, at the same time.

    Raises:
        NodeUnreachable: none answers.
    """

    def offer(node: Node) -> Offer:
        questions: list[Question] = [(GPU, Nothing()), (STATUS, JobArgs()), (HAVE, HaveArgs(segments=list(segments)))]
        gpu, known, there = node.ask(questions, ANSWER_S)
        owed = [job for job in known.jobs if not job.state.ended]
        have = {status.sha256: status for status in there.segments}
        memory = gpu.reading.memory_total_bytes if gpu.reading else 0
        missing = sum(segment.packed_bytes for segment in segments if not have[segment.sha256].present)
        return Offer(node.name, memory, len(owed), missing)

    answers = ask_all(settings, node_names(settings), offer, ANSWER_S)
    offers = [answer for answer in answers.values() if isinstance(answer, Offer)]
    silent = [f"{name}: {answer}" for name, answer in answers.items() if isinstance(answer, HafsError)]
    if not offers:
        raise NodeUnreachable(f"no node answers: {'; '.join(silent)}", hint="name one with --node to hear more")
    need = needed_bytes(base)
    ranked = rank(offers, need)
    return Choice(ranked[0].node, [*(told(offer, need) for offer in ranked), *silent])


def rank(offers: Sequence[Offer], need_bytes: int) -> list[Offer]:
    """The best first; of equal ones the one that was named first."""
    return sorted(offers, key=lambda offer: (_capability(offer, need_bytes), offer.queued, offer.missing_bytes, -offer.gpu_bytes))


def needed_bytes(base: str) -> int:
    """GPU memory that LoRA on this base takes, about; 0: its name does not say."""
    found = _PARAMETERS.findall(base)
    if not found:
        return 0
    number, unit = found[-1]
    parameters = float(number) * (1e9 if unit in "Bb" else 1e6)
    return round(parameters * 2 * 1.25 + 2e9)


def told(offer: Offer, need_bytes: int) -> str:
    need = f", the base needs about {need_bytes / 1e9:.0f} GB" if need_bytes else ""
    gpu = f"a GPU with {offer.gpu_bytes / 1e9:.0f} GB{need}" if offer.gpu_bytes else "no GPU seen"
    jobs = f"{offer.queued} job{'' if offer.queued == 1 else 's'} not ended" if offer.queued else "nothing to do"
    data = f"{offer.missing_bytes / 1e6:.1f} MB of the data to send" if offer.missing_bytes else "has the data"
    return f"{offer.node}: {gpu}; {jobs}; {data}"


def _capability(offer: Offer, need_bytes: int) -> int:
    if not offer.gpu_bytes:
        return 1
    return 0 if offer.gpu_bytes >= need_bytes else 2  # out of memory ends a job that a CPU would only take long for
