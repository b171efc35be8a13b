"""A campaign that tells a pipe the id of each row as soon as `append` has returned: what it told is acknowledged.

    python telling_campaign.py SPEC HANDLE       (HANDLE: an inherited descriptor to write to, a line an id)

All else is `hafs campaign start SPEC`.
"""

import os
import sys

from campaigns import run
from campaigns.cli.main import main
from campaigns.store import Call, Rejected, Store
from config.contracts.sample import Sample

HANDLE = int(sys.argv[2])


class TellingStore(Store):
    async def append(self, call: Call, row: Sample | Rejected | None) -> None:
        await super().append(call, row)
        if row is not None:
            os.write(HANDLE, f"{call.task_id}\n".encode())


if __name__ == "__main__":
    run.Store = TellingStore  # type: ignore[misc]
    sys.argv = ["hafs", "campaign", "start", sys.argv[1]]
    main()
