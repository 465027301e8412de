from __future__ import annotations

import pytest

from vmm.errors import MigrationRefused, OptionInvalid, Unsupported
from vmm.migration.capability_table import (
    MIGRATION_CAPABILITIES,
    RULES,
    SUPPORTED,
    MigrationCapabilities,
    MigrationCapabilityStatus,
    SetMigrationCapabilities,
)
from vmm.monitor.arguments import structure, unstructure


def states(capabilities: MigrationCapabilities) -> dict[str, bool]:
    return {entry.capability: entry.state for entry in capabilities.query()}


def all_supported() -> MigrationCapabilities:
    return MigrationCapabilities(supported=MIGRATION_CAPABILITIES)


def test_all_21_are_listed_in_qemus_order_and_off() -> None:
    listed = MigrationCapabilities().query()
    assert [entry.capability for entry in listed] == list(MIGRATION_CAPABILITIES)
    assert len(listed) == 21
    assert (listed[0].capability, listed[3].capability, listed[20].capability) == ("xbzrle", "events", "mapped-ram")
    assert not any(entry.state for entry in listed)


def test_events_can_be_turned_on_and_off() -> None:
    capabilities = MigrationCapabilities()
    capabilities.update({"events": True})
    assert capabilities["events"]
    capabilities.update({"events": False})
    assert not capabilities["events"]


@pytest.mark.parametrize("name", [name for name in MIGRATION_CAPABILITIES if name not in SUPPORTED])
def test_others_are_refused_by_name_when_on_and_accepted_when_off(name: str) -> None:
    capabilities = MigrationCapabilities()
    capabilities.update({name: False})
    with pytest.raises(Unsupported) as caught:
        capabilities.update({name: True})
    listed = f"leave it off (those that can be on: {', '.join(sorted(SUPPORTED))})"
    expected = f"Migration capability {name!r} is not supported here; {listed}"
    assert str(caught.value) == expected


def test_an_update_is_all_or_nothing() -> None:
    capabilities = MigrationCapabilities()
    with pytest.raises(Unsupported):
        capabilities.update({"events": True, "xbzrle": True})
    assert not capabilities["events"]


def test_what_is_not_named_stays() -> None:
    capabilities = all_supported()
    capabilities.update({"events": True})
    capabilities.update({"return-path": True, "xbzrle": False})
    assert [name for name, state in states(capabilities).items() if state] == ["events", "return-path"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(OptionInvalid) as caught:
        MigrationCapabilities().update({"warp": False})
    assert str(caught.value) == "Migration capability: 'warp' is not one that query-migrate-capabilities lists"
    with pytest.raises(OptionInvalid):
        MigrationCapabilities()["warp"]


def test_rules_name_known_migration_capabilities_once() -> None:
    assert {name for rule in RULES for name in (rule.a, rule.b)} <= set(MIGRATION_CAPABILITIES)
    assert len({frozenset((rule.a, rule.b)) for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.relation == "excludes"])
def test_two_that_exclude_each_other_are_refused_together(rule: object) -> None:
    capabilities = all_supported()
    (found,) = (each for each in RULES if each is rule)
    needed = {each.b for each in RULES if each.relation == "requires" and each.a in (found.a, found.b)}
    with pytest.raises(MigrationRefused):
        capabilities.update(dict.fromkeys({found.a, found.b, *needed}, True))
    assert not any(states(capabilities).values())


def test_an_exclusion_names_both_and_why() -> None:
    capabilities = all_supported()
    capabilities.update({"xbzrle": True})
    with pytest.raises(MigrationRefused) as caught:
        capabilities.update({"multifd": True})
    assert str(caught.value) == (
        "Migration capabilities 'multifd' and 'xbzrle' exclude each other: its deltas need the order of one channel;"
        " turn one of them off"
    )
    capabilities.update({"multifd": True, "xbzrle": False})
    assert capabilities["multifd"]


def test_a_requirement_names_both_and_why() -> None:
    capabilities = all_supported()
    with pytest.raises(MigrationRefused) as caught:
        capabilities.update({"switchover-ack": True})
    assert str(caught.value) == (
        "Migration capability 'switchover-ack' requires 'return-path': the acknowledgement comes over it;"
        " turn 'return-path' on too"
    )
    capabilities.update({"switchover-ack": True, "return-path": True})
    with pytest.raises(MigrationRefused):
        capabilities.update({"return-path": False})
    assert capabilities["return-path"]


def test_arguments_and_reply_have_qemus_form() -> None:
    request = {"capabilities": [{"capability": "events", "state": True}, {"capability": "events", "state": False}]}
    arguments = structure(SetMigrationCapabilities, request, "migrate-set-capabilities")
    assert isinstance(arguments, SetMigrationCapabilities)
    assert arguments.changes() == {"events": False}
    reply = unstructure(MigrationCapabilityStatus(capability="xbzrle", state=False))
    assert reply == {"capability": "xbzrle", "state": False}


# --- for one migration alone ------------------------------------------------------------------------------


def test_what_is_lent_is_given_back() -> None:
    capabilities = all_supported()
    capabilities.update({"events": True, "multifd": False})
    capabilities.lend({"events": False, "multifd": True})
    assert (capabilities["events"], capabilities["multifd"]) == (False, True)
    capabilities.give_back()
    assert (capabilities["events"], capabilities["multifd"]) == (True, False)


def test_what_is_set_while_others_are_lent_stays() -> None:
    capabilities = all_supported()
    capabilities.lend({"events": True, "multifd": True})
    capabilities.update({"multifd": True, "release-ram": True})
    capabilities.give_back()
    assert (capabilities["events"], capabilities["multifd"], capabilities["release-ram"]) == (False, True, True)


def test_a_loan_is_all_or_nothing() -> None:
    capabilities = MigrationCapabilities()
    with pytest.raises(Unsupported):
        capabilities.lend({"events": True, "xbzrle": True})
    assert not capabilities["events"]
    capabilities.lend({"events": True})
    capabilities.give_back()


def test_what_would_break_a_rule_when_the_loan_ends_is_refused() -> None:
    capabilities = all_supported()
    capabilities.update({"xbzrle": True})
    capabilities.lend({"xbzrle": False})
    with pytest.raises(MigrationRefused, match="exclude each other"):
        capabilities.update({"multifd": True})
    assert not capabilities["multifd"]
