"""Between laptop and node."""

import sys
from typing import Any, cast

# paramiko would load invoke, a third of its own start, for a parser of SSH configurations that is not used: `ssh -G` reads them.
cast(Any, sys.modules).setdefault("invoke", None)
