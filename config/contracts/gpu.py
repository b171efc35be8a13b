"""What a machine says of its GPU: the telemetry that a campaign's lanes obey."""

from pydantic import Field

from config.contracts.base import Tolerant


class GpuReading(Tolerant):
    """One look at a GPU.

    `utilization` is the share of time it was busy, in %, with everything that runs on it. `own_share` is the part of it, in %,
    that the model server causes, `training_share` that of hafs's own training; None where the system cannot tell processes apart
    (Windows consumer cards). `holder` names the process that holds most of its memory, with its pid. `leased_to` names the
    training job that has the GPU to itself; empty: nobody. `source` is how it was read (nvml, …).
    """

    utilization: float = Field(ge=0, le=100)
    own_share: float | None = Field(None, ge=0, le=100)
    training_share: float | None = Field(None, ge=0, le=100)
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    holder: str = ""
    holder_pid: int = 0
    leased_to: str = ""
    source: str = ""

    @property
    def foreign(self) -> float | None:
        """Load that is not the model server's, in %; None where it cannot be told apart."""
        return None if self.own_share is None else max(0.0, self.utilization - self.own_share)
