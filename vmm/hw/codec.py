"""Reading and writing of declared state, and a device as the owner of a section.

A codec is prepared ahead of the guest's pause: cattrs compiles one function for writing and one for reading. Reading
stops at the first thing that does not fit; only then, out of any hurry, everything that does not is looked for.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

import attrs

from vmm import hostio
from vmm.errors import StateRejected
from vmm.hw.state import (
    Misfit,
    State,
    declared_fields,
    describe,
    is_enum,
    items_of,
    misfits,
    rule_of,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cattrs import Converter

    from vmm.hw.device import Device
    from vmm.hw.state import Fields, Schema

StateT = TypeVar("StateT", bound=State)

FAULTS_SHOWN: Final = 20
"""A hostile section may have thousands of faults; so many are told."""


@final
class StateCodec(Generic[StateT]):
    """Reads and writes one class of declared state. Immutable; any thread."""

    def __init__(self, kind: type[StateT], converter: Converter) -> None:
        describe(kind)  # refuses a field without a bound
        self.kind: Final = kind
        self.schema: Final = kind.SCHEMA
        self._dump: Final[Callable[[StateT], Fields]] = converter.get_unstructure_hook(kind)
        self._load: Final[Callable[[object, type[StateT]], StateT]] = converter.get_structure_hook(kind)

    @classmethod
    def of(cls, kind: type[StateT], converter: Converter | None = None) -> StateCodec[StateT]:
        """Compile the codec of `kind`: about a millisecond, and the import of cattrs the first time.

        Args:
            converter: of `state_converter`, to be shared by the codecs of a machine.
        """
        return cls(kind, converter or state_converter())

    def dump(self, state: StateT) -> Fields:
        """Return the section: dicts, lists, integers, bytes, bool, str, None. Shares nothing mutable with `state`."""
        return self._dump(state)

    def load(self, section: object, version: int | None = None, device: str | None = None) -> StateT:
        """Build a state from a hostile section, which should be a dict as `dump` returns it.

        Args:
            version: that of the section; None for the present one.
            device: the instance, for the error; None for the schema's name.

        Raises:
            StateRejected: with every fault, each with the path to the field, the value, and what would be right.
        """
        name = device or self.schema.name
        if version is not None and version != self.schema.version:
            section = self._upgraded(section, version, name)
        try:
            return self._load(section, self.kind)
        except Misfit:
            raise self._rejected(name, section) from None

    def _upgraded(self, section: object, version: int, device: str) -> object:
        schema = self.schema
        if not schema.accepts <= version < schema.version:
            read = f"{schema.accepts} to {schema.version}" if schema.accepts < schema.version else f"{schema.version}"
            fault = f"{device} has version {version} of {schema.name}, read here: {read}"
            raise StateRejected(section=device, faults=(fault,))
        if type(section) is not dict:
            raise self._rejected(device, section)
        for step, upgrade in enumerate(schema.upgrades[version - schema.accepts :], start=version):
            try:
                section = upgrade(dict(section))
            except Misfit as misfit:
                raise StateRejected(section=device, faults=(_fault(device, misfit),)) from None
            except KeyError as error:
                if error.args[0] in section:
                    raise  # the upgrade stumbled over something of its own
                fault = f"{device}.{error.args[0]} is missing; version {step} of {schema.name} has it"
                raise StateRejected(section=device, faults=(fault,)) from None
        return section

    def _rejected(self, device: str, section: object) -> StateRejected:
        found = misfits(self.kind, section)
        faults = [_fault(device, misfit) for misfit in islice(found, FAULTS_SHOWN)]
        more = sum(1 for _ in found)
        assert faults, f"{self.kind.__name__} refused what it declares"
        return StateRejected(section=device, faults=(*faults, *([f"and {more} more faults"] if more else [])))


def _fault(device: str, misfit: Misfit) -> str:
    return f"{device}{misfit.path} {misfit.problem}"


def state_converter() -> Converter:
    """Return a cattrs converter that knows the kinds of `vmm.hw.state`, and is strict about each.

    Raises:
        HostFileRefused: the host did not let cattrs be imported.
    """
    with hostio.importing("cattrs"):
        import cattrs  # 13 ms: paid when state is first to travel, not when the program starts

    converter = cattrs.Converter(detailed_validation=False, unstruct_collection_overrides={tuple: list})
    converter.register_structure_hook(bool, _structure_bool)
    converter.register_structure_hook_factory(is_enum, _enum_hook)
    converter.register_structure_hook_factory(attrs.has, lambda kind: _class_hook(converter, kind))
    converter.register_structure_hook_factory(lambda kind: rule_of(kind) is not None, _rule_hook)
    converter.register_structure_hook_factory(
        lambda kind: items_of(kind) is not None, lambda kind: _items_hook(converter, kind)
    )
    return converter


# What a misfit is, and where, is found out afterwards by `misfits`: here it only has to end the reading.


def _structure_bool(value: object, _: object) -> bool:
    if type(value) is not bool:
        raise Misfit("", shown(value))
    return value


def _rule_hook(kind: object) -> Callable[[object, object], object]:
    rule = rule_of(kind)
    assert rule is not None
    fits = rule.fits

    def structure(value: object, _: object) -> object:
        if not fits(value):
            raise Misfit("", shown(value))
        return value

    return structure


def _enum_hook(kind: object) -> Callable[[object, object], object]:
    assert is_enum(kind)
    members = {(type(member.value), member.value): member for member in kind}

    def structure(value: object, _: object) -> object:
        # An unhashable value would end the look-up with a TypeError.
        member = members.get((type(value), value)) if isinstance(value, int | str) else None
        if member is None:
            raise Misfit("", shown(value))
        return member

    return structure


def _items_hook(converter: Converter, kind: object) -> Callable[[object, object], object]:
    items = items_of(kind)
    assert items is not None
    most, item_kind, collect = items
    item_hook = converter.get_structure_hook(item_kind)

    def structure(value: object, _: object) -> object:
        if type(value) is not list or len(value) > most:
            raise Misfit("", shown(value))
        return collect(item_hook(item, item_kind) for item in value)

    return structure


def _class_hook(converter: Converter, kind: type) -> Callable[[object, object], object]:
    from cattrs.gen import make_dict_structure_fn

    # cattrs would let a field with a default be missing; a section has all fields, or an upgrade supplies them.
    names = declared_fields(kind).keys()
    build: Callable[[Mapping[str, object], object], object] = make_dict_structure_fn(
        kind, converter, _cattrs_detailed_validation=False
    )

    def structure(value: object, _: object) -> object:
        if type(value) is not dict or value.keys() != names:
            raise Misfit("", shown(value))
        return build(value, kind)

    return structure


@final
class Codecs:
    """The codecs of one machine, each compiled when it is first asked for. On the loop."""

    def __init__(self) -> None:
        self._converter: Converter | None = None
        self._codecs: Final[dict[type, StateCodec[Any]]] = {}

    def of(self, kind: type[StateT]) -> StateCodec[StateT]:
        """Return the codec of `kind`."""
        codec = self._codecs.get(kind)
        if codec is None:
            self._converter = self._converter or state_converter()
            codec = self._codecs[kind] = StateCodec.of(kind, self._converter)
        return codec


@final
class DeviceSection:
    """A device as the owner of a section: what a state registry asks of it, under the same names.

    Making one is cheap. `prepare` is not, and should be done before the guest is paused.
    """

    def __init__(self, device: Device, codecs: Codecs | None = None) -> None:
        """`codecs` are to be shared by the devices of a machine."""
        self._device: Final = device
        self._codecs: Final = codecs or Codecs()
        schema: Schema = device.state.SCHEMA
        self.name: Final = device.name
        self.version: Final = schema.version
        self.accepts: Final = schema.accepts

    def prepare(self) -> None:
        """Compile what `save` and `load` need, and would otherwise compile in the guest's time. Can be repeated."""
        self._codecs.of(type(self._device.state))

    def save(self) -> Fields:
        """Return the device's state. It is of one moment only if no vCPU runs and no back end stirs."""
        return self._codecs.of(type(self._device.state)).dump(self._device.state)

    def load(self, version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        """Check a hostile section and return what puts it in force. Nothing has changed yet. Raises `StateRejected`."""
        state = self._codecs.of(type(self._device.state)).load(section, version, self.name)

        def apply() -> None:
            self._device.state = state
            self._device.after_load()

        return apply
