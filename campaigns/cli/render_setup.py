"""What `hafs doctor` shows."""

from collections.abc import Sequence

from rich.text import Text

from campaigns.cli.render import as_json, console, line, printable, table
from campaigns.doctor import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def checks(found: Sequence[Check], json_wanted: bool) -> None:
    """A row a check, with what to do below what is wrong."""
    if json_wanted:
        return as_json([check._asdict() for check in found])
    made = table("", "what", "found")
    made.columns[2].overflow = "fold"
    for check in found:
        detail = Text(printable(check.detail))
        if check.hint and check.verdict != "ok":
            detail.append(f"\n{printable(check.hint)}", style="dim")
        made.add_row(Text(check.verdict if check.verdict != "fail" else "FAIL", style=STYLES[check.verdict]), check.name, detail)
    console.print(made, soft_wrap=False)
    failed = sum(check.verdict == "fail" for check in found)
    line(f"{failed} to mend before a campaign can run" if failed else "nothing stands in a campaign's way")
