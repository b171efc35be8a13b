"""Which servers are at home: on this machine or in its private network. Names are judged as they stand, nothing is looked up."""

import ipaddress

_PRIVATE_NAMES = (".local", ".lan", ".internal", ".home.arpa")


def at_home(host: str) -> bool:
    """Whether a host name or an IP address is of this machine or of a private network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_NAMES)
    return address.is_loopback or address.is_private
