"""What `hafs campaign check` does: look ahead and, if it is wanted, ask the lanes first."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from campaigns.estimate import Estimate, estimate
from campaigns.outlook import Probe
from campaigns.spec import CampaignSpec
from config.settings import Settings

if TYPE_CHECKING:
    from campaigns.probe import ShowPull


@dataclass(frozen=True)
class Checked:
    """`probes` is empty where nobody was asked; `pulled` names the lanes whose models were fetched."""

    estimate: Estimate
    probes: list[Probe]
    pulled: list[str]


def check(
    settings: Settings, spec: CampaignSpec, folder: Path, *, probe: bool = False, pull: bool = False, show: "ShowPull"
) -> Checked:
    """Estimate a campaign; `pull` fetches missing models first, `probe` sends one request to every lane.

    Raises:
        ConfigError: the spec cannot run: a domain, a price, a node or a key is missing.
        ProviderError: a model cannot be fetched.
    """
    probes, pulled = [], []
    if probe or pull:
        from campaigns.probe import probe_lanes, pull_models  # their SDKs take a while to load

        pulled = anyio.run(pull_models, settings, spec, show) if pull else []
        probes = anyio.run(probe_lanes, settings, spec, folder) if probe else []
    return Checked(estimate(settings, spec, folder, {found.lane: found for found in probes}), probes, pulled)
