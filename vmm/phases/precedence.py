"""Who goes first while a guest stands that is to run here next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from vmm.cpr.urgency import Urgency
from vmm.decisions import Turn

if TYPE_CHECKING:
    from vmm.nursery_tree import Tree


@final
class Precedence:
    """That of one guest over other processes of the host, and over whoever gives commands here."""

    def __init__(self, tree: Tree) -> None:
        self._tree: Final = tree
        self._urgency: Final = Urgency()
        self._turn: Final = Turn[None](None, until="running")
        self._taken = False

    def hurry(self) -> None:
        """Put this process before others, as `Urgency`."""
        self._urgency.begin()

    def hold_off(self) -> None:
        """Hold off commands that change the machine; see `taken`."""
        self._tree.hold_off(self._turn)

    def taken(self) -> None:
        """Say that phase running is next: only in its window they find what is for a guest that runs."""
        self._tree.move(self._turn)
        self._taken = True

    def close(self) -> None:
        """Let the others have their turn; commands not before there is that window, if it is next. Idempotent."""
        self._urgency.close()
        if not self._taken:
            self._turn.succeed()
