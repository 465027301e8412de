"""Every failure the VMM expects, with the QMP class that each one answers with.

An error that is not a `VmmError` is a bug: no handler catches it, and it unwinds the nursery tree.

    VmmError                                     GenericError
    ├─ TokenError       TokenRevoked · TokenNotGranted · TokenWithheld · SessionNotGranted · ...
    ├─ RequestError     MalformedRequest · InvalidArguments · CommandNotFound · ...
    ├─ HostError        HostFileRefused · KvmCallFailed · KvmExtensionMissing, CpuFeatureMissing (KVMMissingCap)
    ├─ DeviceError      AddressConflict · NameTaken · DeviceNotFound · DeviceNotActive · BackendNotFound
    ├─ BootError        an image that cannot be booted
    ├─ MigrationError   a stream, a setting or a peer of a migration
    └─ CprError         the hand-over between two processes

`str()` of an error is one sentence for an operator: what was asked for, what stood in its way, with the value,
and what would be right. The cause is chained, never repeated in the text.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Iterator

QmpClass = Literal["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"]


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False)
class VmmError(Exception):
    """Base of all expected failures. A subclass declares its fields, and words itself in `text`, a format over them.

    Fields are given by keyword. The classes are not made by attrs: there are many, each would cost 0.25 ms, and all of
    them are imported before the monitor can answer.
    """

    qmp_class: ClassVar[QmpClass] = "GenericError"
    text: ClassVar[str]
    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        own = (name for name, hint in cls.__annotations__.items() if not str(hint).startswith("ClassVar"))
        cls._fields = (*cls._fields, *own)

    def __init__(self, **fields: Any) -> None:
        cls = type(self)
        unknown = [name for name in fields if name not in cls._fields]
        missing = [name for name in cls._fields if name not in fields and not hasattr(cls, name)]
        if unknown or missing:
            wrong = [*(f"{name} is no field" for name in unknown), *(f"{name} is missing" for name in missing)]
            raise TypeError(f"{cls.__name__}: {', '.join(wrong)}")
        self.__dict__.update(fields)
        super().__init__(*fields.values())

    def __str__(self) -> str:
        return self.text.format(**{name: getattr(self, name) for name in self._fields})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"


def leaves(group: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions at the ends of `group` (or `group` itself), in raising order."""
    if isinstance(group, BaseExceptionGroup):
        for error in group.exceptions:
            yield from leaves(error)
    else:
        yield group


# --- tokens and phases ------------------------------------------------------------------------------------


class TokenError(VmmError):
    """An effect was asked for without the authority for it."""


class TokenRevoked(TokenError):
    """A token was used after its phase window closed."""

    text: ClassVar[str] = "{kind} was granted by phase {window} and ended with it"
    kind: str
    window: str


class TokenOutOfScope(TokenError):
    """A narrowed token was used for a name that it does not cover."""

    text: ClassVar[str] = "{kind} of phase {window} covers only {scope}, not {wanted!r}"
    kind: str
    window: str
    scope: str
    wanted: str


class TokenNotGranted(TokenError):
    """No open phase grants what a command needs."""

    text: ClassVar[str] = "Command {command!r} needs {kind}, which phase {phase} does not grant{hint}"
    command: str
    kind: str
    phase: str
    hint: str = ""


class TokenWithheld(TokenError):
    """An exclusive child phase holds back what its parent would grant."""

    text: ClassVar[str] = "Command {command!r} needs {kind}, which phase {phase} withholds until it ends"
    command: str
    kind: str
    phase: str


class SessionNotGranted(TokenError):
    """The session's own grant does not contain a kind."""

    text: ClassVar[str] = "Command {command!r} needs {kind}, which this session (grant {grant}) may not be lent"
    command: str
    kind: str
    grant: str


class MachineReserved(TokenError):
    """Somebody else is in the middle of building the machine."""

    text: ClassVar[str] = (
        "Command {command!r} needs {kind}, reserved for {holder} until it is done; "
        "query, quit and migrate_cancel are not"
    )
    command: str
    kind: str
    holder: str


class DrainTimeout(TokenError):
    """An exclusive phase could not open because a user of its parent did not finish."""

    text: ClassVar[str] = "Phase {phase} could not open within {seconds:g} s: {holders} still in progress"
    phase: str
    seconds: float
    holders: str


class CommandAborted(TokenError):
    """The phase ended while one of its commands was still running."""

    text: ClassVar[str] = "Command {command!r} was cut short because its phase ended"
    command: str


# --- requests ---------------------------------------------------------------------------------------------


class RequestError(VmmError):
    """A request that no command could answer."""


class MalformedRequest(RequestError):
    """A message that is no QMP request. `reason` is the whole sentence."""

    text: ClassVar[str] = "{reason}"
    reason: str


class InvalidArguments(RequestError):
    """A request's arguments do not fit the command; `faults` has every one."""

    text: ClassVar[str] = "Command {command!r}: {joined}"
    command: str
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"Command {self.command!r}: {'; '.join(self.faults)}"


class CommandNotFound(RequestError):
    """No such command, or none in this state of the session. `reason` is the whole sentence."""

    qmp_class: ClassVar[QmpClass] = "CommandNotFound"
    text: ClassVar[str] = "{reason}"
    reason: str


class Unsupported(RequestError):
    """A thing QEMU has, by name, and this VMM has not."""

    text: ClassVar[str] = "{what} {name!r} is not supported here; {instead}"
    what: str
    name: str
    instead: str


class InvalidState(RequestError):
    """A command that the machine's present state rules out."""

    text: ClassVar[str] = "{what} is not possible {state}; {instead}"
    what: str
    state: str
    instead: str


class OptionInvalid(RequestError):
    """A value that an option, an argument or a recipe line cannot have."""

    text: ClassVar[str] = "{option}: {value!r} is not {wanted}"
    option: str
    value: object
    wanted: str


class RecipeInvalid(RequestError):
    """A recipe that cannot be read or carried out. `reason` names what and what would be right."""

    text: ClassVar[str] = "Recipe {source}, {where}: {reason}"
    source: str
    where: str
    reason: str


class DifferencesVisible(RequestError):
    """The machine here would differ from the source's in what its guest sees."""

    text: ClassVar[str] = (
        "The guest would see that its machine is another one here: {joined}; allow each by its name "
        "(x-allow-difference), or configure it as it is at the source"
    )
    items: tuple[str, ...]

    def __str__(self) -> str:
        return self.text.format(joined="; ".join(self.items))


class ResourcesMissing(RequestError):
    """A recipe from elsewhere names resources of this host that nobody gave it."""

    text: ClassVar[str] = "no descriptor came for {joined}, and this host's own are allowed by name: {hint}"
    names: tuple[str, ...]

    def __str__(self) -> str:
        hint = " ".join(f"-allow-resource {name}=PATH" for name in self.names)
        return self.text.format(joined=", ".join(self.names), hint=hint)


class SectionsUnreadable(RequestError):
    """A source would send sections that are not read here; `faults` has every one."""

    text: ClassVar[str] = "The state that would come is not read here: {joined}; {advice}"
    faults: tuple[str, ...]
    later: bool
    """Whether one of them is of a later program than this."""

    def __str__(self) -> str:
        advice = (
            "use a destination whose program is as new as the source's"
            if self.later
            else "update by way of a program that reads these and writes later ones"
        )
        return self.text.format(joined="; ".join(self.faults), advice=advice)


# --- the host ---------------------------------------------------------------------------------------------


class HostError(VmmError):
    """The host did not do what was asked of it."""


class HostFileRefused(HostError):
    """A path of the host could not be opened, created, bound or connected."""

    text: ClassVar[str] = "Cannot {action} {path}: {reason}"
    action: str
    path: str
    reason: str


class TooManyDescriptors(HostError):
    """More descriptors are to come than this process may have."""

    text: ClassVar[str] = (
        "{count} descriptors cannot come: {there} are open here, and no more than {limit} may be; "
        "start this process where `ulimit -Hn` says at least {needed}"
    )
    count: int
    there: int
    limit: int
    needed: int


class SocketInUse(HostError):
    """Another live process listens on a socket path."""

    text: ClassVar[str] = "Cannot listen on {path}: another process answers there; stop it or choose another path"
    path: str


class PeerRefused(HostError):
    """A process of another user connected to a socket of ours."""

    text: ClassVar[str] = "Peer of {path} has uid {uid}; only uid {wanted} and root are admitted"
    path: str
    uid: int
    wanted: int


class DescriptorError(HostError):
    """A descriptor passed by a client is missing or misnamed. `reason` is the whole sentence."""

    text: ClassVar[str] = "{reason}"
    reason: str


class GuestPageLost(HostError):
    """A page of the guest's RAM cannot be had from the file that it was saved in. `damaged`: it can be read."""

    text: ClassVar[str] = "Cannot have the guest's RAM at {address:#x} from {path}, offset {offset}: {reason}"
    address: int
    path: str
    offset: int
    reason: str
    damaged: bool = False


class PageFaultsUnavailable(HostError):
    """The host's kernel does not let this process answer page faults as it must."""

    text: ClassVar[str] = "Cannot {action}: {reason}"
    action: str
    reason: str


class KvmCallFailed(HostError):
    """An ioctl on a KVM descriptor returned an error. `ioctl` is the name in linux/kvm.h, `errno` the host's."""

    text: ClassVar[str] = "{ioctl} failed{context}: "
    ioctl: str
    errno: int
    context: str = ""

    def __str__(self) -> str:
        where = f" for {self.context}" if self.context else ""
        return f"{self.ioctl} failed{where}: {os.strerror(self.errno)} (errno {self.errno})"


class KvmUnavailable(HostError):
    """There is no usable /dev/kvm. `reason` says why and `instead` what would help."""

    text: ClassVar[str] = "Cannot use {path}: {reason}; {instead}"
    path: str
    reason: str
    instead: str


class KvmExtensionMissing(HostError):
    """The host's KVM lacks an extension that was asked for."""

    qmp_class: ClassVar[QmpClass] = "KVMMissingCap"
    text: ClassVar[str] = "This host's KVM does not offer {name}, which {user} needs"
    name: str
    user: str


class CpuFeatureMissing(HostError):
    """A CPU feature was asked for that guests cannot have here. `reason` says who lacks it."""

    qmp_class: ClassVar[QmpClass] = "KVMMissingCap"
    text: ClassVar[str] = "CPU feature {name!r} cannot be switched on: {reason}"
    name: str
    reason: str


# --- devices and back ends --------------------------------------------------------------------------------


class DeviceError(VmmError):
    """A device or back end that cannot be had as asked."""


class AddressConflict(DeviceError):
    """Two devices claim one guest address."""

    text: ClassVar[str] = "{wanted} wants guest addresses {first:#x} to {last:#x}, held by {holder}"
    wanted: str
    holder: str
    first: int
    last: int


class NameTaken(DeviceError):
    """A name is given twice."""

    text: ClassVar[str] = "{what} {name!r} exists already; choose another name"
    what: str
    name: str


class DeviceNotFound(DeviceError):
    """No device has that name."""

    qmp_class: ClassVar[QmpClass] = "DeviceNotFound"
    text: ClassVar[str] = "{what} {name!r} does not exist{known}"
    what: str
    name: str
    known: str = ""


class BackendNotFound(DeviceError):
    """No back end has that name. QEMU's class DeviceNotFound is for devices alone."""

    text: ClassVar[str] = "{what} {name!r} does not exist{known}"
    what: str
    name: str
    known: str = ""


class DeviceNotActive(DeviceError):
    """What was asked about does not exist in this phase of the machine."""

    qmp_class: ClassVar[QmpClass] = "DeviceNotActive"
    text: ClassVar[str] = "{what} is not there before phase {phase}"
    what: str
    phase: str


class BackendInUse(DeviceError):
    """A back end serves another user already."""

    text: ClassVar[str] = "{what} {name!r} is in use by {user}"
    what: str
    name: str
    user: str


class GuestAddressInvalid(DeviceError):
    """An access to guest memory that is not all inside one region of RAM. `regions` describes the RAM."""

    text: ClassVar[str] = "{size} bytes at guest address {address:#x} are not all RAM, which is at {regions}"
    address: int
    size: int
    regions: str


# --- boot images ------------------------------------------------------------------------------------------


class BootError(VmmError):
    """An image that cannot be booted, or does not fit."""

    text: ClassVar[str] = "Cannot boot {image}: {reason}"
    image: str
    reason: str


# --- migration --------------------------------------------------------------------------------------------


class MigrationError(VmmError):
    """A migration that cannot start or go on."""


class MigrationRefused(MigrationError):
    """A migration or a setting of it that cannot be. `reason` is the whole sentence."""

    text: ClassVar[str] = "{reason}"
    reason: str


class StreamCorrupt(MigrationError):
    """A state stream that is not one of ours, or was damaged."""

    text: ClassVar[str] = "State stream: {reason}"
    reason: str


class StateRejected(MigrationError):
    """A section is malformed, out of range or of a version that is not read here; `faults` has every one."""

    text: ClassVar[str] = "Section {section}: {joined}"
    section: str
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"Section {self.section}: {'; '.join(self.faults)}"


class MigrationPeerGone(MigrationError):
    """The other side of a migration closed its channel, died, or did nothing for too long."""

    text: ClassVar[str] = "The {peer} {what}; {outcome}"
    peer: str
    what: str
    outcome: str


class MigrationCommandFailed(MigrationError):
    """A command at the other end of a channel has ended too early, or not well."""

    text: ClassVar[str] = (
        "Migration command {command!r} {how}; it must take or give the whole stream, and end with status 0"
    )
    command: str
    how: str


class TlsFailed(MigrationError):
    """There is no TLS with a peer: `what` it has done, and what would be right `instead`."""

    text: ClassVar[str] = "TLS with the {peer}: {what}; {instead}"
    peer: str
    what: str
    instead: str


class MigrationCancelled(MigrationError):
    """Somebody asked for the end of the migration."""

    text: ClassVar[str] = "The migration was cancelled {by}"
    by: str


# --- live update ------------------------------------------------------------------------------------------


class CprError(VmmError):
    """A live update that did not come about."""


class CprRefused(CprError):
    """One side refused, before the guest changed hands."""

    text: ClassVar[str] = "Live update refused by the {side} at step {step!r}: {reason}"
    side: str
    step: str
    reason: str


class CprPeerGone(CprError):
    """The other process closed its channel, died or stalled."""

    text: ClassVar[str] = "The {peer} {what} at step {step!r}; {outcome}"
    peer: str
    what: str
    step: str
    outcome: str


class CprHostFailed(CprError):
    """The host refused one side something that it needs to go on: a descriptor, memory, room on a disk."""

    text: ClassVar[str] = "The {side} cannot go on at step {step!r}: {reason}"
    side: str
    step: str
    reason: str


class DescriptorMissing(CprError):
    """A descriptor that the recipe needs was not sent."""

    text: ClassVar[str] = "The source sent no descriptor named {name!r}"
    name: str


class CommandDeferred(VmmError):
    """A command that waited, and has done nothing yet, is to be begun anew later. Internal: no client sees it."""

    text: ClassVar[str] = "The command is to be begun anew once it is known which process has the guest"


class DescriptorsUnclaimed(CprError):
    """The source sent descriptors that nothing in the recipe asks for."""

    text: ClassVar[str] = "Descriptors that nothing in the recipe asks for: {joined}"
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"Descriptors that nothing in the recipe asks for: {', '.join(self.names)}"


class DescriptorWrongKind(CprError):
    """A descriptor is of another kind than its name promises."""

    text: ClassVar[str] = "Descriptor {name!r} is {found}, not {wanted}"
    name: str
    found: str
    wanted: str
