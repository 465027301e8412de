"""Commands that plug devices in and take them off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, final

import attrs
import trio

from vmm.capabilities import MayAppendRecipe, MayPlugDevice, MayQuery
from vmm.errors import DeviceNotFound
from vmm.monitor.arguments import unstructure
from vmm.monitor.command import For
from vmm.phases.commands_backends import Id
from vmm.phases.foundation import Host

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vmm.monitor.qapi import Shape


DEVICES: Final = "devices"
"""What the token must cover."""


@final
@attrs.frozen(kw_only=True)
class DeviceAdd:
    """Arguments of `device_add`. Which properties a driver has, `device-list-properties` tells."""

    driver: str
    bus: str | None = None
    id: str | None = None
    properties: dict[str, object] = attrs.field(factory=dict, metadata={"rest": True})


async def device_add(
    may: Annotated[MayPlugDevice | MayAppendRecipe, For(DEVICES)], query: MayQuery, args: DeviceAdd
) -> None:
    """Plug a device in. In preconfig it is planned, and built with the board; in running it is hot plug."""
    from vmm.phases.slot_plan import Request  # Which a monitor alone does not need.

    arguments = _wired(args)
    if isinstance(may, MayAppendRecipe):
        await trio.lowlevel.checkpoint()
        may.append(DEVICES, "device_add", arguments)
    else:
        planned = await may.plug(Request.of(arguments))
        query.view(Host).recorder.record("device_add", planned.arguments)


async def device_del(may: Annotated[MayPlugDevice | MayAppendRecipe, For(DEVICES)], query: MayQuery, args: Id) -> None:
    """Take a device off, whether or not the guest still uses it; nothing of it is left when this is answered."""
    from vmm.phases.slot_plan import PERIPHERAL

    host = query.view(Host)
    name = args.id.removeprefix(PERIPHERAL)
    if isinstance(may, MayAppendRecipe):
        await trio.lowlevel.checkpoint()
        may.append(DEVICES, "device_del", {"id": name})
    else:
        await may.unplug(name)
        host.recorder.forget("device_add", "id", name)
    host.events.emit("DEVICE_DELETED", {"device": name, "path": f"{PERIPHERAL}{name}"})


def _wired(args: DeviceAdd) -> Mapping[str, Any]:
    arguments = unstructure(args)
    assert isinstance(arguments, dict)
    return arguments


@final
@attrs.frozen(kw_only=True)
class ListProperties:
    """Arguments of `device-list-properties`."""

    typename: str


@final
@attrs.frozen(kw_only=True)
class PropertyInfo:
    """QEMU's ObjectPropertyInfo."""

    name: str
    type: str
    description: str | None = None
    default_value: object = None


def device_list_properties(may: MayQuery, args: ListProperties) -> list[PropertyInfo]:
    """List what a device can be told when it is plugged in."""
    from vmm.monitor.qapi import Object, shape_of
    from vmm.phases.slot_plan import DRIVERS

    if args.typename not in DRIVERS:
        known = f"; there are: {', '.join(sorted(DRIVERS))}"
        raise DeviceNotFound(what="Device type", name=args.typename, known=known)
    kind = DRIVERS[args.typename]
    shape = shape_of(kind)
    assert isinstance(shape, Object)
    return [
        PropertyInfo(
            name=member.wire,
            type=_type(member.shape),
            default_value=attrs.fields_dict(kind)[member.attribute].default,
        )
        for member in shape.members
    ]


def _type(shape: Shape) -> Literal["str", "int"]:
    from vmm.monitor.qapi import Integer

    return "int" if isinstance(shape, Integer) else "str"
