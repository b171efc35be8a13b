"""What `hafs sync` prints."""

from collections.abc import Sequence

from campaigns.cli import render
from campaigns.sync.push import PushResult
from config.contracts.wire import Garbage
from config.errors import NodeUnreachable


def round_of(node: str, result: PushResult | NodeUnreachable) -> None:
    """One line of a push that follows a campaign."""
    if isinstance(result, NodeUnreachable):
        return render.line(f"{result}; the campaign goes on, and what it makes is sent later")
    render.pushed(result, node)


def garbage(where: dict[str, Sequence[Garbage]], dry_run: bool, json_wanted: bool) -> None:
    """What went from each machine, or would go."""
    if json_wanted:
        return render.as_json({name: [each.model_dump() for each in found] for name, found in where.items()})
    for name, found in where.items():
        for each in found if dry_run else ():
            render.line(f"{name}: {each.name}  {render.size(each.bytes)}")
        freed = render.size(sum(each.bytes for each in found))
        render.line(f"{name}: {len(found)} files, {freed} {'would be freed' if dry_run else 'freed'}")
