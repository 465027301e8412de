"""QEMU's migration parameters: types, ranges, defaults, and which of them mean something here.

A parameter that is not supported can be set to its default, so that a client which sets all of them still works;
another value is refused by name.

Source: QEMU qapi/migration.json (MigrationParameters), migration/options.c (ranges and defaults).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, final, get_args

import attrs

from vmm.errors import OptionInvalid, Unsupported
from vmm.migration.parameter_arguments import MigrationMode, ParameterValues, ZeroPageDetection

_PAGE_SIZE: Final = 4096
_U32: Final = 0xFFFF_FFFF
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF
_MIB: Final = 1 << 20

_MULTIFD_LIMIT: Final = 16
_PACKED: Final = ("none", "zlib", "zstd")
"""Of QEMU's ways to pack pages (`MultifdCompression`) those that there are here."""

Kind = Literal["int", "bool", "str", "strings", "bitmaps"]


@final
@attrs.frozen
class Parameter:
    """One migration parameter, by its name on the wire."""

    name: str
    kind: Kind
    default: Any
    low: int = attrs.field(default=0, kw_only=True)
    high: int = attrs.field(default=_U64, kw_only=True)
    unit: str = attrs.field(default="", kw_only=True)
    choices: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    power_of_two: bool = attrs.field(default=False, kw_only=True)
    supported: bool = attrs.field(default=False, kw_only=True)
    """Whether other values than the default can be set."""

    def check(self, value: object) -> None:
        """Raise `OptionInvalid` unless `value` has the parameter's type and range."""
        if not _FITS[self.kind](self, value):
            raise OptionInvalid(option=f"Migration parameter {self.name}", value=value, wanted=self.wanted())

    def wanted(self) -> str:
        """Say what values there are, as the end of a sentence "… is not"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind != "int":
            return _WANTED[self.kind]
        number = "a power of two" if self.power_of_two else "an integer"
        return f"{number} from {self.low} to {self.high}{self.unit and f' {self.unit}'}"


def _fits_int(parameter: Parameter, value: object) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return parameter.low <= value <= parameter.high and not (parameter.power_of_two and value & (value - 1))


def _fits_str(parameter: Parameter, value: object) -> bool:
    return isinstance(value, str) and (not parameter.choices or value in parameter.choices)


def _fits_strings(_parameter: Parameter, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_FITS: Final[Mapping[Kind, Callable[[Parameter, object], bool]]] = {
    "int": _fits_int,
    "bool": lambda _parameter, value: isinstance(value, bool),
    "str": _fits_str,
    "strings": _fits_strings,
    "bitmaps": lambda _parameter, value: isinstance(value, list),
}
_WANTED: Final[Mapping[Kind, str]] = {
    "bool": "true or false",
    "str": "a string",
    "strings": "a list of strings",
    "bitmaps": "a list of node mappings",
}

PARAMETERS: Final = (
    Parameter("announce-initial", "int", 50, high=100_000, unit="ms"),
    Parameter("announce-max", "int", 550, high=100_000, unit="ms"),
    Parameter("announce-rounds", "int", 5, high=1000),
    Parameter("announce-step", "int", 100, high=10_000, unit="ms"),
    Parameter("throttle-trigger-threshold", "int", 50, low=1, high=100, unit="percent", supported=True),
    Parameter("cpu-throttle-initial", "int", 20, low=1, high=99, unit="percent", supported=True),
    Parameter("cpu-throttle-increment", "int", 10, low=1, high=99, unit="percent", supported=True),
    Parameter("cpu-throttle-tailslow", "bool", False, supported=True),
    Parameter("tls-creds", "str", "", supported=True),
    Parameter("tls-hostname", "str", "", supported=True),
    Parameter("tls-authz", "str", ""),
    # A live update copies no RAM, so it stays within any limit on copying; QEMU's clients set these first of all.
    Parameter("max-bandwidth", "int", 128 * _MIB, unit="bytes/s", supported=True),
    Parameter("avail-switchover-bandwidth", "int", 0, unit="bytes/s", supported=True),
    Parameter("downtime-limit", "int", 300, high=2_000_000, unit="ms", supported=True),
    Parameter("x-checkpoint-delay", "int", 20_000, high=_U32, unit="ms"),
    Parameter("multifd-channels", "int", 2, low=1, high=_MULTIFD_LIMIT, supported=True),
    Parameter("xbzrle-cache-size", "int", 64 * _MIB, low=_PAGE_SIZE, high=1 << 63, unit="bytes", power_of_two=True),
    Parameter("max-postcopy-bandwidth", "int", 0, unit="bytes/s", supported=True),
    Parameter("max-cpu-throttle", "int", 99, low=1, high=99, unit="percent", supported=True),
    Parameter("multifd-compression", "str", "none", choices=_PACKED, supported=True),
    Parameter("multifd-zlib-level", "int", 1, high=9, supported=True),
    Parameter("multifd-qatzip-level", "int", 1, low=1, high=9),
    Parameter("multifd-zstd-level", "int", 1, high=20, supported=True),
    Parameter("block-bitmap-mapping", "bitmaps", None),
    Parameter("x-vcpu-dirty-limit-period", "int", 1000, low=1, high=1000, unit="ms", supported=True),
    Parameter("vcpu-dirty-limit", "int", 1, low=1, unit="MB/s", supported=True),
    Parameter("mode", "str", "normal", choices=get_args(MigrationMode), supported=True),
    Parameter("zero-page-detection", "str", "multifd", choices=get_args(ZeroPageDetection), supported=True),
    Parameter("direct-io", "bool", False),
    Parameter("x-rdma-chunk-size", "int", _MIB, low=_MIB, high=1024 * _MIB, unit="bytes", power_of_two=True),
    Parameter("cpr-exec-command", "strings", (), supported=True),
    Parameter("migrate-sessions", "bool", False, supported=True),
    Parameter("x-keep-source", "bool", False, supported=True),
    Parameter("x-restore-on-demand", "bool", False, supported=True),
)
"""In the order of QEMU's MigrationParameters, which is the order of `query-migrate-parameters`; three are ours."""


@final
class _Present(Mapping[str, Any]):
    """A mapping that is another one at each look."""

    def __init__(self, values: Callable[[], Mapping[str, Any]]) -> None:
        self._values: Final = values

    def __getitem__(self, name: str) -> Any:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


@final
class MigrationParameters:
    """The values of all migration parameters."""

    def __init__(self) -> None:
        self._table: Final[Mapping[str, Parameter]] = {parameter.name: parameter for parameter in PARAMETERS}
        self._values: Mapping[str, Any] = {
            parameter.name: [] if parameter.kind == "strings" else parameter.default
            for parameter in PARAMETERS
            if parameter.default is not None
        }
        self._present: Final = _Present(lambda: self._values)
        self._former: Mapping[str, Any] = {}
        self._chosen: dict[str, Any] = {}

    @property
    def chosen(self) -> Mapping[str, Any]:
        """What was set by wire name, for a successor: neither defaults nor what is lent."""
        return dict(self._chosen)

    @property
    def values(self) -> Mapping[str, Any]:
        """Every value by wire name, as it is at each look, from whatever thread: it may change while one migrates."""
        return self._present

    def inherit(self, changes: Mapping[str, Any]) -> None:
        """Set what a predecessor had set, but for what was set here itself; what is lent here stays until it is given
        back. Raises as `update` does; then nothing has changed."""
        fresh = {name: value for name, value in changes.items() if name not in self._chosen}
        self.check(fresh)
        self._former = {**self._former, **{name: value for name, value in fresh.items() if name in self._former}}
        self._values = {**self._values, **{name: fresh[name] for name in fresh if name not in self._former}}
        self._chosen.update(fresh)

    def update(self, changes: Mapping[str, Any]) -> None:
        """Check the result of `changes` as a whole, then apply all of them; on an error nothing has changed.

        Args:
            changes: values by wire name (`ParameterValues.changes`), of any type.

        Raises:
            OptionInvalid: a name, a type or a value that QEMU's schema does not admit either.
            Unsupported: a value that QEMU would take and that means nothing here.
        """
        values = self.check(changes)
        self._former = {name: value for name, value in self._former.items() if name not in changes}
        self._values = values
        self._chosen.update(changes)

    def check(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the values would be with `changes`. Raises as `update` does."""
        for name, value in changes.items():
            parameter = self._table.get(name)
            if parameter is None:
                raise OptionInvalid(
                    option="Migration parameter", value=name, wanted="one that query-migrate-parameters lists"
                )
            parameter.check(value)
        values = {**self._values, **changes}
        self._check_throttle(values, changes)
        for name, value in changes.items():
            _refuse_unsupported(self._table[name], value)
        return values

    def lend(self, changes: Mapping[str, Any]) -> None:
        """Apply `changes` until `give_back`. What `update` sets meanwhile stays. Raises as `update` does."""
        assert not self._former, "one migration is under way at a time"
        values = self.check(changes)
        self._former = {name: self._values.get(name) for name in changes}
        self._values = values

    def give_back(self) -> None:
        """Undo `lend`."""
        values = {**self._values, **self._former}
        # One that was not set before, which has no default, is not set again.
        self._values, self._former = {name: value for name, value in values.items() if value is not None}, {}

    def query(self) -> ParameterValues:
        """Return every value; `block-bitmap-mapping` only where it was set."""
        return ParameterValues(**{name.replace("-", "_"): value for name, value in self._values.items()})

    def __getitem__(self, name: str) -> object:
        """Return one value by wire name; None for an unset `block-bitmap-mapping`."""
        return self._values.get(self._table[name].name)

    @property
    def mode(self) -> MigrationMode:
        """What kind of migration the next `migrate` is."""
        mode: MigrationMode = self._values["mode"]
        return mode

    @staticmethod
    def _check_throttle(values: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Check the one rule between two parameters; blame the one that is being changed."""
        first, last = values["cpu-throttle-initial"], values["max-cpu-throttle"]
        if first <= last:
            return
        if "max-cpu-throttle" in changes:
            wanted = f"an integer from cpu-throttle-initial, {first}, to 99 percent"
            raise OptionInvalid(option="Migration parameter max-cpu-throttle", value=last, wanted=wanted)
        wanted = f"an integer from 1 to max-cpu-throttle, {last} percent"
        raise OptionInvalid(option="Migration parameter cpu-throttle-initial", value=first, wanted=wanted)


def _refuse_unsupported(parameter: Parameter, value: object) -> None:
    # An empty list asks for nothing, whether or not the default is one.
    asks = bool(value) if isinstance(value, list) else value != parameter.default
    if asks and not parameter.supported:
        raise Unsupported(what="Migration parameter", name=parameter.name, instead=_leave(parameter))


def _leave(parameter: Parameter) -> str:
    return f"leave it at its default, {parameter.default!r}" if parameter.default not in (None, ()) else "leave it out"
