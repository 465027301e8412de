"""What of a machine cannot go over, as sentences, known before anything of a migration starts.

A sentence names the thing, says why it stays, and what would help. No client of a monitor keeps a machine from moving:
one that cannot go along is told, or stays with the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm import host_fds
from vmm.capabilities import QTEST
from vmm.errors import MigrationRefused
from vmm.phases.fdsets import FdSets
from vmm.phases.monitors import Monitor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.phases.foundation import Host


def blocked_reasons(host: Host, parameters: Mapping[str, Any]) -> list[str]:
    """Return why the machine cannot move in the way that `parameters` say; empty if it can.

    Args:
        parameters: migration parameters, of which `mode`, `migrate-sessions` and `x-keep-source` count.
    """
    mode = parameters.get("mode", "normal")
    if mode not in ("cpr-transfer", "cpr-exec"):
        return []  # A copy leaves to this process all that is the host's.
    found = [*_of_this_program(host, parameters), *_of_descriptors(host.tree.view(FdSets)), *_of_qtests(host)]
    if parameters.get("migrate-sessions"):
        found += _of_sessions(host)
    return found


def require_unblocked(command: str, host: Host, parameters: Mapping[str, Any]) -> None:
    """Raise `MigrationRefused`, with every reason, if the machine cannot move. Arguments as of `blocked_reasons`."""
    reasons = blocked_reasons(host, parameters)
    if reasons:
        raise MigrationRefused(reason=f"{command}: {'; '.join(reasons)}")


def _of_this_program(host: Host, parameters: Mapping[str, Any]) -> Iterator[str]:
    executes, keeps = parameters["mode"] == "cpr-exec", parameters.get("x-keep-source")
    if executes and not host.start.own_process:
        yield "the machine runs inside another program, whose process is not its own to replace; use mode cpr-transfer"
    elif executes and keeps:
        yield "mode cpr-exec leaves no process that x-keep-source could keep; turn x-keep-source off"
    elif keeps and not host.start.own_process:
        yield "the machine runs inside another program, whose process cannot stand by for it; turn x-keep-source off"


def _of_descriptors(sets: FdSets) -> Iterator[str]:
    for number, held in sets.sets.items():
        for entry in held:
            if stays := _kept_by_the_kernel(entry.fd):
                yield f"a descriptor of fdset {number} {stays}; remove-fd it"
    if reason := sets.too_much():
        yield f"the descriptor sets hold too much ({reason}); remove-fd some"


def _of_qtests(host: Host) -> Iterator[str]:
    for name, (monitor, _) in host.stores.monitors.items():
        if monitor.grant == QTEST.name and not monitor.moves and monitor.clients:
            yield (
                f"the client of qtest {name!r} has a connection that stays with this process; "
                f"have it connect to one that listens (server=on), or object-del {name!r}"
            )


def _of_sessions(host: Host) -> Iterator[str]:
    for monitor, _ in host.stores.monitors.values():
        if isinstance(monitor, Monitor) and monitor.goes_along is not None:
            for session, descriptors in monitor.descriptors_of_clients.items():
                for name, fd in descriptors.items():
                    if stays := _kept_by_the_kernel(fd):
                        instead = "closefd it, or leave migrate-sessions off"
                        yield f"descriptor {name!r} of session {session} {stays}; {instead}"


def _kept_by_the_kernel(fd: int) -> str:
    """Return words that follow what a descriptor is called if it cannot be passed; empty if it can."""
    reason = host_fds.why_not_passed(fd)
    return f"is {host_fds.opened_as(fd)}, which the kernel passes to no process ({reason})" if reason else ""
