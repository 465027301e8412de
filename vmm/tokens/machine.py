"""What may be done to a machine that is being built: the tokens of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from vmm.facets import Board, Configurator, MemoryMap, NumaNodes, RecipeSink, StateIndex
from vmm.tokens.mechanism import Token

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping


@final
class MayConfigureMachine(Token[Configurator]):
    """May decide what the machine is; narrowed to the decision that the open phase waits for."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-configure-machine"

    def decide(self, subject: str, decision: object) -> Awaitable[None]:
        """Post the decision on `subject`: `machine`, `cpu` or `board`."""
        return self._reach(subject).decide(decision)


@final
class MayOpenKvm(Token[Configurator]):
    """May open the accelerator and create the virtual machine in it."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-open-kvm"

    def decide(self, decision: object) -> Awaitable[None]:
        """Post the choice of accelerator."""
        return self._reach().decide(decision)


@final
class MayAppendRecipe(Token[RecipeSink]):
    """May add commands to what is carried out later: `device_add` in preconfig, and what a destination overrides."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-append-recipe"

    def append(self, subject: str, command: str, arguments: Mapping[str, Any]) -> None:
        """Note `command` with `arguments`, to be carried out later. `subject`: `devices` or `overrides`."""
        self._reach(subject).append(command, arguments)


@final
class MaySetNuma(Token[NumaNodes]):
    """May divide the machine's memory and vCPUs into NUMA nodes."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-set-numa"

    def set(self, options: Any) -> None:
        """Make a node, set a distance, or place vCPUs."""
        self._reach().set(options)


@final
class MayPlugDevice(Token[Board]):
    """May add devices to the machine's buses, and take them off."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-plug-device"

    def fix(self, device: Any) -> None:
        """Put `device`, which is part of the board, on the bus at its addresses."""
        self._reach().fix(device)

    async def plug(self, request: Any) -> Any:
        """Plug in what `request` asks for, and return it with all that was left open."""
        return await self._reach().plug(request)

    async def unplug(self, name: str) -> None:
        """Take device `name` off."""
        await self._reach().unplug(name)


@final
class MayMapGuestMemory(Token[MemoryMap]):
    """May map RAM into the guest's physical address space."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-map-guest-memory"

    def map(self) -> None:
        """Give every RAM region its KVM memory slot."""
        self._reach().map()


@final
class MayDeclareState(Token[StateIndex]):
    """May declare sections of state that travel."""

    __slots__ = ()
    wire_name: ClassVar[str] = "may-declare-state"

    def register(
        self,
        name: str,
        version: int,
        *,
        save: Any,
        load: Any,
        accepts: int | None = None,
        after: Iterable[str] = (),
        optional: bool = False,
    ) -> None:
        """Add a section to what travels: how it is saved, checked and loaded, and which ones come before it."""
        self._reach().register(name, version, save=save, load=load, accepts=accepts, after=after, optional=optional)
