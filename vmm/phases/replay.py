"""Recipes as sessions: the command line's recipe and a predecessor's are executed like a client's commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.capabilities import ADMIN, REPLAY, Grant
from vmm.errors import VmmError
from vmm.recipe import replay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.nursery_tree import Tree
    from vmm.phases.foundation import Host
    from vmm.recipe import Recipe, Step


@final
@attrs.frozen
class Replayer:
    """The caller on whose behalf a recipe is executed. Has no descriptors of its own."""

    name: str
    grant: Grant
    by_number: bool
    """Whether it is of who started this process, and gave it descriptors."""

    @property
    def descriptors(self) -> dict[str, int]:
        """Return none."""
        return {}

    def take_descriptors(self) -> list[int]:
        """Return none."""
        return []


REPLAYER: Final = Replayer("the start recipe", ADMIN, by_number=True)
SUCCESSOR: Final = Replayer("the incoming recipe", REPLAY, by_number=False)


async def replay_start(host: Host, tree: Tree) -> None:
    """Replay the start recipe; the tree has been told that this is what it begins with."""
    await _replay(host, host.start.recipe, REPLAYER)
    if host.start.begun is not None:
        host.start.begun()
    tree.begun()


async def replay_incoming(host: Host, tree: Tree, recipe: Recipe) -> None:
    """Replay a predecessor's recipe, with its descriptors in place of this host's files; nobody else may interfere.

    If it fails before it has defined the machine, all is as it was, and another may be replayed.
    """
    await tree.wait_begun("migrate-incoming", SUCCESSOR.name)
    tree.reserved_for = SUCCESSOR.name
    try:
        # The names in the recipe are the guest's machine's; what this process was started with has others from now on.
        renamed = host.stores.step_aside(recipe, f"@{os.getpid()}")
        host.recorder.rename(renamed)
        try:
            await _replay(host, recipe, SUCCESSOR)
        except VmmError:
            if tree.machine_phase == "no-machine":
                await _take_back(host, recipe, renamed)
            raise
    except BaseException:
        tree.reserved_for = None
        raise


async def _take_back(host: Host, recipe: Recipe, renamed: Mapping[str, str]) -> None:
    """End what was made under the names in `recipe`, and give those names back to what had stepped aside for it."""
    stores, recorder = host.stores, host.recorder
    # Monitors first: they use chardevs. Of objects for devices there are none without a machine.
    for command, family, there in (
        ("object-add", "monitor", stores.monitors),
        ("object-add", "memory", stores.memories),
        ("object-add", "snapshots", stores.snapshots),
        ("chardev-add", "chardev", stores.chardevs),
    ):
        for name in {str(step.arguments.get("id")) for step in recipe if step.execute == command} & there.keys():
            await stores.dismiss(family, name)
            recorder.forget(command, "id", name)
    back = {new: old for old, new in renamed.items()}
    stores.rename(back)
    recorder.rename(back)


async def _replay(host: Host, recipe: Recipe, caller: Replayer) -> None:
    async def execute(step: Step) -> object:
        return await host.table.execute(caller, step.execute, step.arguments)

    await replay(recipe, execute)
