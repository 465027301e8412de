"""Who is to have which of the board's virtio slots: known from phase preconfig on, before there is a board."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.backends.rng import BuiltinRng
from vmm.errors import (
    BackendInUse,
    BackendNotFound,
    DeviceNotFound,
    InvalidState,
    NameTaken,
    OptionInvalid,
    Unsupported,
)
from vmm.hw import board
from vmm.monitor.arguments import structure, unstructure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.backends.rng import Rng
    from vmm.phases.recorder import Recorder
    from vmm.phases.stores import BootStores

BUSES: Final[Mapping[str, int]] = {board.virtio_bus(slot): slot for slot in range(board.VIRTIO_SLOTS)}

PERIPHERAL: Final = "/machine/peripheral/"
"""How the QOM paths of devices with a name begin."""

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")

PERIOD: Final = 65536
"""QEMU's default, in ms."""


@final
@attrs.frozen(kw_only=True)
class RngProperties:
    """What a virtio-rng-device can be told."""

    rng: str | None = None
    """Id of the object that gives the random bytes; without, the host kernel's generator does."""
    max_bytes: int | None = None
    """How many the guest gets in a period; without, as many as it likes."""
    period: int = PERIOD
    """Length of a period in ms."""

    def check(self) -> None:
        """Raise `OptionInvalid` for the first value that can't be."""
        if self.max_bytes is not None and self.max_bytes < 1:
            raise OptionInvalid(option="max-bytes", value=self.max_bytes, wanted="a number of bytes, 1 or more")
        if not 1 <= self.period < 1 << 32:
            raise OptionInvalid(option="period", value=self.period, wanted="a number of milliseconds, 1 or more")


DRIVERS: Final[Mapping[str, type[RngProperties]]] = {"virtio-rng-device": RngProperties}
"""What can be plugged in, and what it can be told."""


@final
@attrs.frozen(kw_only=True)
class Request:
    """A device that somebody wants."""

    driver: str
    id: str | None
    bus: str | None
    properties: RngProperties

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """Read the arguments of a `device_add`.

        Raises:
            Unsupported: there is no such driver.
            InvalidArguments: the driver has no such properties, or they are of other types.
        """
        driver = arguments["driver"]
        if driver not in DRIVERS:
            instead = f"there is {', '.join(DRIVERS)}; devices for blocks and networks come later"
            raise Unsupported(what="Device driver", name=driver, instead=instead)
        given = {name: value for name, value in arguments.items() if name not in ("driver", "id", "bus")}
        properties = structure(DRIVERS[driver], given, "device_add")
        assert isinstance(properties, RngProperties)
        return cls(driver=driver, id=arguments.get("id"), bus=arguments.get("bus"), properties=properties)


@final
@attrs.frozen(kw_only=True)
class Planned:
    """A device that has a slot, and all else that it needs."""

    driver: str
    id: str
    bus: str
    properties: RngProperties
    source: Rng

    @property
    def slot(self) -> int:
        """The number of its slot."""
        return BUSES[self.bus]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the `device_add` that asks for just this."""
        properties = unstructure(self.properties)
        assert isinstance(properties, dict)
        return {"driver": self.driver, "id": self.id, "bus": self.bus, **properties}


@final
class SlotPlan:
    """Who has which slot, and its back end. What can be known of a device before the board is there is checked here."""

    def __init__(self, stores: BootStores) -> None:
        self._stores: Final = stores
        self._by_slot: Final[dict[int, Planned]] = {}

    @property
    def devices(self) -> tuple[Planned, ...]:
        """All devices, in the order in which they were asked for."""
        return tuple(self._by_slot.values())

    def reserve(self, request: Request) -> Planned:
        """Give a slot and a back end to what `request` asks for, and a name if it has none.

        Raises:
            OptionInvalid: a value that can't be.
            NameTaken, BackendInUse: another device has that name, or that slot.
            BackendNotFound: there is no such slot.
            DeviceNotFound: there is no such source of random bytes.
            InvalidState: all slots are taken.
        """
        request.properties.check()
        name = self._name(request.id)
        slot = self._slot(request.bus)
        source = self._source(request.properties.rng, name)
        planned = Planned(
            driver=request.driver, id=name, bus=board.virtio_bus(slot), properties=request.properties, source=source
        )
        self._by_slot[slot] = planned
        return planned

    def find(self, name: str) -> Planned:
        """Return the device `name`: an id, or the path of a QOM object. Raises `DeviceNotFound`."""
        wanted = name.removeprefix(PERIPHERAL)
        for planned in self._by_slot.values():
            if planned.id == wanted:
                return planned
        known = ", ".join(sorted(planned.id for planned in self._by_slot.values())) or "none"
        raise DeviceNotFound(what="Device", name=name, known=f"; there are: {known}")

    def release(self, planned: Planned) -> None:
        """Take slot and back end back."""
        del self._by_slot[planned.slot]
        if planned.properties.rng is not None:
            self._stores.free_rng(planned.properties.rng, planned.id)

    def _name(self, wanted: str | None) -> str:
        taken = {planned.id for planned in self._by_slot.values()}
        if wanted is None:
            return next(name for number in range(len(taken) + 1) if (name := f"device{number}") not in taken)
        if not _ID.fullmatch(wanted):
            shape = "an id: a letter, then letters, digits, '-', '.' and '_', at most 128 in all"
            raise OptionInvalid(option="id", value=wanted, wanted=shape)
        if wanted in taken:
            raise NameTaken(what="Device", name=wanted)
        return wanted

    def _slot(self, bus: str | None) -> int:
        if bus is None:
            free = [slot for slot in range(board.VIRTIO_SLOTS) if slot not in self._by_slot]
            if not free:
                taken = f"while all {board.VIRTIO_SLOTS} virtio slots are taken"
                raise InvalidState(what="device_add", state=taken, instead="device_del frees one")
            return free[0]
        if bus not in BUSES:
            known = f"; there are: {board.virtio_bus(0)} to {board.virtio_bus(board.VIRTIO_SLOTS - 1)}"
            raise BackendNotFound(what="Bus", name=bus, known=known)
        slot = BUSES[bus]
        if slot in self._by_slot:
            raise BackendInUse(what="Bus", name=bus, user=f"device {self._by_slot[slot].id}")
        return slot

    def _source(self, wanted: str | None, user: str) -> Rng:
        if wanted is not None:
            return self._stores.take_rng(wanted, user)
        return BuiltinRng()


@final
class PlannedDevices:
    """The facet of `may-append-recipe` before there is a board: devices get their slots, and are built with it."""

    def __init__(self, plan: SlotPlan, recorder: Recorder) -> None:
        self._plan: Final = plan
        self._recorder: Final = recorder

    def append(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Plan a device (`device_add`), or give it up (`device_del`)."""
        if command == "device_del":
            planned = self._plan.find(arguments["id"])
            self._plan.release(planned)
            self._recorder.forget("device_add", "id", planned.id)
        else:
            assert command == "device_add"
            self._recorder.record(command, self._plan.reserve(Request.of(arguments)).arguments)
