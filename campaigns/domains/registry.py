"""The domains by name."""

from campaigns.domains.asm.domain import AsmDomain
from campaigns.domains.base import Domain
from config.errors import ConfigError

_DOMAINS: dict[str, type[Domain]] = {AsmDomain.name: AsmDomain}


def names() -> list[str]:
    return list(_DOMAINS)


def domain(name: str) -> Domain:
    """The domain of that name.

    Raises:
        ConfigError: there is none; the hint names those there are.
    """
    if name not in _DOMAINS:
        raise ConfigError(f'there is no domain "{name}"', hint=f"known domains: {', '.join(_DOMAINS)}")
    return _DOMAINS[name]()
