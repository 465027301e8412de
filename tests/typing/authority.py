"""Misuses of tokens that a type checker must refuse.

Never run, and never imported. mypy is strict here, so an ignored error that is not there is an error itself: each
`type: ignore` line below is a test, after python-trio's type_tests. `test_authority.py` runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.capabilities import (
    Cell,
    MayConfigureMachine,
    MayCreateBackend,
    MayOpenHostFile,
    MayOpenKvm,
    MayPlugDevice,
    MayQuery,
    MayQuit,
    MayReleaseGuest,
    MayRunVcpus,
    MaySaveState,
    MaySendDescriptors,
    MaySetMigrationCap,
    Token,
)
from vmm.phases.accel import AccelGrants
from vmm.phases.commands_machine import accel_set, cont, machine_set
from vmm.phases.foundation import Ending

if TYPE_CHECKING:
    from vmm.capabilities import Mint, Views
    from vmm.cpr.cell import OwnershipCell
    from vmm.nursery_tree import Phase, Window
    from vmm.phases.board import BoardBuilder
    from vmm.phases.boot import BootGrants
    from vmm.phases.config import AcceleratorOptions, MachineOptions
    from vmm.phases.devices import DevicesGrants
    from vmm.phases.handover import HandoverGrants
    from vmm.phases.machine import Machine
    from vmm.phases.migrating import MigratingGrants
    from vmm.phases.precreate import PrecreateGrants
    from vmm.phases.quiesced import QuiescedGrants
    from vmm.phases.running import RunningGrants
    from vmm.phases.stores import BootStores


# --- a token comes from a window and from nowhere else --------------------------------------------------------


def no_token_has_a_public_constructor(cell: Cell[Ending]) -> None:
    MayQuit()  # type: ignore[call-arg]
    MayQuit(None, cell, None)  # type: ignore[arg-type]
    MayQuit("may-quit", cell, None)  # type: ignore[arg-type]


def no_kind_is_derived() -> None:
    class MayQuitTwice(MayQuit):  # type: ignore[misc]
        pass


def no_other_object_is_a_token() -> None:
    quit_: MayQuit = Ending()  # type: ignore[assignment]
    query: MayQuery = quit_  # type: ignore[assignment]
    del query


def narrowing_does_not_change_the_kind(may: MayCreateBackend) -> None:
    other: MayOpenHostFile = may.only("chardev")  # type: ignore[assignment]
    del other


def a_scope_is_not_widened(may: MayCreateBackend) -> None:
    may.scope = None  # type: ignore[misc]


def a_cell_is_not_read_past_its_revocation(may: MayQuit, cell: Cell[Ending]) -> None:
    may.cell.facet("may-quit").end("host-ui")  # type: ignore[attr-defined]
    cell.facet().end("host-ui")  # type: ignore[call-arg]


# --- who has an effect takes a token for it --------------------------------------------------------------------


def a_command_needs_its_token(options: AcceleratorOptions) -> None:
    accel_set(options)  # type: ignore[call-arg, arg-type]
    accel_set(args=options)  # type: ignore[call-arg]


def another_token_does_not_do(may: MayQuery, host: MayOpenHostFile, options: MachineOptions) -> None:
    machine_set(may, host, options)  # type: ignore[arg-type]
    cont(may)  # type: ignore[arg-type]


def one_decision_is_not_the_other(may: MayConfigureMachine, options: AcceleratorOptions) -> None:
    accel_set(may, options)  # type: ignore[arg-type]


def a_union_of_kinds_admits_no_third(
    may: MayConfigureMachine, other: MayCreateBackend, options: MachineOptions
) -> None:
    machine_set(may, other, options)  # type: ignore[arg-type]


def building_takes_the_tokens_of_phase_devices(builder: BoardBuilder, plug: MayPlugDevice) -> None:
    builder.build(plug, plug, plug)  # type: ignore[arg-type]
    builder.build()  # type: ignore[call-arg]


def writing_to_the_guest_takes_a_token_that_a_non_owner_lacks(grants: DevicesGrants) -> None:
    grants.write_guest_memory.write(0, b"")  # type: ignore[union-attr]


# --- a token has the effects of its kind and no others -----------------------------------------------------------


def who_may_query_may_not_end(may: MayQuery) -> None:
    may.end("host-qmp-quit")  # type: ignore[attr-defined]


async def who_may_quit_may_not_run(may: MayQuit) -> None:
    await may.cont()  # type: ignore[attr-defined]


async def who_may_open_files_may_not_create(may: MayOpenHostFile) -> None:
    await may.adopt("chardev", "serial0", object())  # type: ignore[attr-defined]


def who_may_save_may_not_load(may: MaySaveState) -> None:
    may.check([])  # type: ignore[attr-defined]


def who_may_release_may_not_send(may: MayReleaseGuest) -> None:
    may.send("paused", {}, {})  # type: ignore[attr-defined]


def settings_have_their_type(may: MaySetMigrationCap) -> None:
    may.update({"auto-converge": "on"})  # type: ignore[dict-item]


def an_effect_names_what_it_is_for(may: MayConfigureMachine, options: MachineOptions) -> None:
    may.decide(options)  # type: ignore[call-arg, arg-type]


# --- a phase grants what its class lists ----------------------------------------------------------------------


def boot_configures_no_machine(window: Window[BootGrants]) -> None:
    assert window.grants.configure_machine  # type: ignore[attr-defined]


def precreate_opens_no_kvm(window: Window[PrecreateGrants]) -> None:
    assert window.grants.open_kvm  # type: ignore[attr-defined]


def accel_writes_to_no_guest(window: Window[AccelGrants]) -> None:
    assert window.grants.write_guest_memory  # type: ignore[attr-defined]


def running_releases_no_guest(window: Window[RunningGrants]) -> None:
    assert window.grants.release_guest  # type: ignore[attr-defined]


def migrating_saves_no_state(window: Window[MigratingGrants]) -> None:
    assert window.grants.save_state  # type: ignore[attr-defined]


def quiesced_runs_no_vcpus(window: Window[QuiescedGrants]) -> None:
    assert window.grants.run_vcpus  # type: ignore[attr-defined]


def handover_sends_no_descriptors(window: Window[HandoverGrants]) -> None:
    assert window.grants.send_descriptors  # type: ignore[attr-defined]


def a_phase_is_not_its_window(phase: Phase) -> None:
    assert phase.grants  # type: ignore[attr-defined]


def grants_do_not_change(window: Window[AccelGrants], may: MayOpenKvm) -> None:
    window.grants.open_kvm = may  # type: ignore[misc]


# --- a mint checks the facet --------------------------------------------------------------------------------------


def a_token_is_not_minted_over_another_facet(
    mint: Mint, ending: Ending, cell: OwnershipCell, views: Views, stores: BootStores
) -> None:
    mint(MayQuit, object())  # type: ignore[arg-type]
    mint(MayQuit, views)  # type: ignore[arg-type]
    mint(MayRunVcpus, cell)  # type: ignore[arg-type]
    mint(MayReleaseGuest, ending)  # type: ignore[arg-type]
    mint(MaySendDescriptors, stores)  # type: ignore[arg-type]


def grants_are_made_of_the_kinds_they_list(mint: Mint, ending: Ending, host: MayOpenHostFile) -> AccelGrants:
    return AccelGrants(open_kvm=mint(MayQuit, ending), open_host_file=host)  # type: ignore[arg-type]


def what_is_minted_is_a_kind(mint: Mint, ending: Ending) -> None:
    mint(Ending, ending)  # type: ignore[arg-type, type-var]
    mint(MayQuit, ending, only={"anything"})  # type: ignore[arg-type]


def a_facet_is_no_token(facet: BootStores) -> Token[Any]:
    return facet  # type: ignore[return-value]


# --- a view shows, and changes nothing that takes a token ---------------------------------------------------------


def a_view_does_not_write_to_the_guest(machine: Machine) -> None:
    machine.power_on()  # type: ignore[call-arg]
    machine.memory = machine.memory  # type: ignore[misc]
