"""A chardev that is a pty of the host."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, ClassVar, Final, final

from vmm import host_fds
from vmm.backends.chardev import Chardev
from vmm.backends.chardev_watch import poll

if TYPE_CHECKING:
    from vmm.backends.chardev import Complain
    from vmm.backends.chardev_options import ChardevKind


@final
class PtyChardev(Chardev):
    """The master of a pty. Output is dropped while nobody has the slave open.

    Whether the slave is open is asked when there is output, and an edge tells when somebody types there; so its opening
    needs no polling.
    """

    kind: ClassVar[ChardevKind] = "pty"

    def __init__(self, label: str, master: int, complain: Complain, *, inherited: bool = False) -> None:
        """Own `master`, which does not block."""
        super().__init__(label, complain, inherited=inherited)
        self._master = master
        self._slave: Final = host_fds.pty_slave_name(master)
        self._watch.add(master)

    @property
    def filename(self) -> str:
        return f"pty:{self._slave}"

    @property
    def pty(self) -> str | None:
        return self._slave

    def descriptors(self) -> dict[str, int]:
        return {"master": self._master}

    def _step(self) -> bool:
        wrote = self._write_some()
        return self._read_some() or wrote

    def _write_some(self) -> bool:
        # The kernel would take what is written to a closed slave, and show it, long out of date, to who opens it next.
        if self._output.held and poll(self._master) & select.POLLHUP:
            return self._drop_held()
        return self._write_to(self._master)

    def _read_some(self) -> bool:
        return self._read_from(self._master)

    def _release(self, *, owner: bool) -> None:
        self._watch.remove(self._master)
        os.close(self._master)
