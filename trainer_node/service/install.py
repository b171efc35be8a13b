"""Install the daemon as a service where this machine has a service manager; elsewhere a daemon starts when it is asked for.

The daemon that runs is stopped first, whoever started it; a job goes on, and the daemon of the service adopts it.
"""

import sys
from pathlib import Path

from config.errors import NodeError
from config.settings import load_settings
from trainer_node.daemon import daemon_pid
from trainer_node.service.base import Definition, Service, ServiceStatus, define, service_name
from trainer_node.service.launchd import Launchd
from trainer_node.service.systemd import Systemd
from trainer_node.service.task_scheduler import TaskScheduler

STOP_S = 20.0
ON_DEMAND = "no service manager here: a daemon starts when a job comes, or when somebody asks for the jobs"


def service_here() -> Service | None:
    """The service manager of this machine; None where there is none, as in a container."""
    if sys.platform == "win32":
        return TaskScheduler()
    if sys.platform == "darwin":
        return Launchd()
    systemd = Systemd()
    return systemd if systemd.works() else None


def install(root: Path) -> str:
    """Install or renew the service of `root`, run by this environment. Returns what was done, in lines. Raises NodeError."""
    definition, service = _definition(root), service_here()
    stop_daemon(root)
    if service is None:
        return ON_DEMAND
    note = service.install(definition)
    return f"{service.kind} {definition.name}" + (f"\n{note}" if note else "")


def uninstall(root: Path) -> str:
    """Stop and remove the service of `root`; a running job goes on. Returns what was done. Raises NodeError."""
    service = service_here()
    gone = service is not None and service.uninstall(_name(root))
    stop_daemon(root)
    return f"removed {service.kind} {_name(root)}" if service and gone else "no service was installed"


def status(root: Path) -> ServiceStatus:
    """The service of `root`, as its manager sees it."""
    service = service_here()
    return ServiceStatus(False, False, ON_DEMAND) if service is None else service.status(_name(root))


def service_command(root: Path) -> str:
    """The command line of the installed service; empty for no service."""
    service = service_here()
    return "" if service is None else service.command(_name(root))


def stop_daemon(root: Path) -> None:
    """End the daemon of `root` and wait until it has. Nothing it does can be lost: its successor finds all in the files.

    Raises:
        NodeError: it does not end.
    """
    import psutil

    pid = daemon_pid(root)
    if not pid:
        return
    try:
        process = psutil.Process(pid)
        process.terminate()
        process.wait(STOP_S)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired as error:
        raise NodeError(f"the daemon (pid {pid}) does not end", hint=f"look into {root / 'daemon.log'}") from error


def _definition(root: Path) -> Definition:
    return define(root, load_settings().node_root)


def _name(root: Path) -> str:
    return service_name(root, load_settings().node_root)
