"""What of a chardev travels: all that is pending in it in a live update, its bytes alone otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from vmm.errors import StateRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm.backends.chardev import Chardev
    from vmm.backends.chardev_state import ChardevState

    Save = Callable[[], Mapping[str, Any]]
    Load = Callable[[int, Mapping[str, Any]], Callable[[], None]]

SECTION: Final = "chardev/"
"""How the sections' names begin."""

BYTES_VERSION: Final = 1
"""Of a section that has the bytes alone."""

_MEMBERS: Final[Mapping[str, type]] = {"output": bytes, "input": bytes, "escape": bool, "terminal": bytes}


def saver(chardev: Chardev) -> Save:
    """Return what saves all that is pending in `chardev`."""
    return lambda: attrs.asdict(chardev.pending())


def loader(label: str, take_over: Callable[[ChardevState], None]) -> Load:
    """Return what checks the section of chardev `label`, whose predecessor's state `take_over` puts in force."""

    def load(_version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        from vmm.backends.chardev_state import ChardevState

        faults = [
            f"{SECTION}{label}.{name} must be of type {kind.__name__}"
            for name, kind in _MEMBERS.items()
            if not isinstance(section.get(name), kind)
        ]
        faults += [f"{SECTION}{label}.{name} is unknown" for name in section if name not in _MEMBERS]
        try:
            state = None if faults else ChardevState(**section)
        except ValueError as error:
            faults.append(f"{SECTION}{label}: {error}")
        if state is None:
            raise StateRejected(section=f"{SECTION}{label}", faults=tuple(faults))
        found = state
        return lambda: take_over(found)

    return load


def byte_saver(chardev: Chardev) -> Save:
    """Return what saves the bytes that are pending in `chardev`."""

    def save() -> Mapping[str, Any]:
        pending = chardev.pending()
        return {"output": pending.output, "input": pending.input}

    return save


def byte_loader(port: str, take_bytes: Callable[[ChardevState], None]) -> Load:
    """Return what checks the section of serial port `port`, whose bytes `take_bytes` puts in force."""

    def load(_version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        from vmm.backends.chardev_state import ChardevState

        name = f"{SECTION}{port}"
        if set(section) != {"output", "input"} or not all(isinstance(value, bytes) for value in section.values()):
            raise StateRejected(section=name, faults=("it must have members output and input, both bytes",))
        try:
            state = ChardevState(**section)
        except ValueError as error:
            raise StateRejected(section=name, faults=(str(error),)) from error
        return lambda: take_bytes(state)

    return load
