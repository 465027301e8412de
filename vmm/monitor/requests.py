"""What a QMP request has to look like, before anybody asks which command it is.

Source: QEMU docs/interop/qmp-spec.rst, sections "Issuing commands" and "Out-of-band execution".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.errors import MalformedRequest
from vmm.monitor.json_stream import Message

if TYPE_CHECKING:
    from vmm.monitor.json_stream import Fault


def is_out_of_band(item: Message | Fault) -> bool:
    """Tell whether a message asks to be run at once, past those that wait. It may be wrong in other ways."""
    value = item.value if isinstance(item, Message) else None
    return isinstance(value, dict) and "exec-oob" in value and "execute" not in value


def read_request(value: object, *, oob: bool) -> tuple[str, dict[str, Any]]:
    """Return the command's name and arguments of a request; `oob` tells whether `exec-oob` was negotiated.

    Raises:
        MalformedRequest: it is none. The first fault in the order of check is told.
    """
    if not isinstance(value, dict):
        kind = "an array" if isinstance(value, list) else "null" if value is None else "a scalar"
        raise MalformedRequest(reason=f"A request must be a JSON object with the member 'execute', not {kind}")
    command: str | None = None
    asked_by = ""
    arguments: dict[str, Any] = {}
    for key, member in value.items():
        if key == "execute" or (key == "exec-oob" and oob):
            if not isinstance(member, str):
                raise MalformedRequest(reason=f"Request member '{key}' must be a string, the name of a command")
            if command is not None:
                raise MalformedRequest(reason=f"Request member '{key}' clashes with '{asked_by}'; give one of them")
            command, asked_by = member, key
        elif key == "arguments":
            if not isinstance(member, dict):
                raise MalformedRequest(reason="Request member 'arguments' must be an object")
            arguments = member
        elif key != "id":
            raise MalformedRequest(reason=_unexpected(key, oob=oob))
    if command is None:
        raise MalformedRequest(reason="The request lacks the member 'execute', the name of a command")
    return command, arguments


def _unexpected(key: str, *, oob: bool) -> str:
    if key == "exec-oob":
        return "Request member 'exec-oob' is unexpected: out-of-band execution was not enabled with qmp_capabilities"
    known = "'execute', 'exec-oob', 'arguments' and 'id'" if oob else "'execute', 'arguments' and 'id'"
    return f"Request member '{key[:80]}' is unexpected; there are {known}"
