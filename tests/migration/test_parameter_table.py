from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import attrs
import pytest

from vmm.errors import OptionInvalid, Unsupported
from vmm.migration.parameter_arguments import MigrationMode, ParameterValues
from vmm.migration.parameter_table import PARAMETERS, MigrationParameters
from vmm.monitor.arguments import structure, unstructure

if TYPE_CHECKING:
    from typing import Any

DEFAULTS = {
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "throttle-trigger-threshold": 50,
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "cpu-throttle-tailslow": False,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "max-bandwidth": 134217728,
    "avail-switchover-bandwidth": 0,
    "downtime-limit": 300,
    "x-checkpoint-delay": 20000,
    "multifd-channels": 2,
    "xbzrle-cache-size": 67108864,
    "max-postcopy-bandwidth": 0,
    "max-cpu-throttle": 99,
    "multifd-compression": "none",
    "multifd-zlib-level": 1,
    "multifd-qatzip-level": 1,
    "multifd-zstd-level": 1,
    "x-vcpu-dirty-limit-period": 1000,
    "vcpu-dirty-limit": 1,
    "mode": "normal",
    "zero-page-detection": "multifd",
    "direct-io": False,
    "x-rdma-chunk-size": 1048576,
    "cpr-exec-command": [],
    "migrate-sessions": False,
    "x-keep-source": False,
    "x-restore-on-demand": False,
}
"""QEMU's, and of two of our own."""


def test_query_replies_qemus_defaults() -> None:
    reply = unstructure(MigrationParameters().query())
    assert isinstance(reply, dict)
    assert list(reply.items()) == list(DEFAULTS.items())


def test_table_and_wire_form_have_the_same_members_in_the_same_order() -> None:
    members = [field.name.replace("_", "-") for field in attrs.fields(ParameterValues)]
    assert members == [parameter.name for parameter in PARAMETERS]


def test_all_defaults_can_be_set() -> None:
    parameters = MigrationParameters()
    parameters.update(DEFAULTS)
    assert unstructure(parameters.query()) == DEFAULTS


def test_an_update_changes_what_it_names() -> None:
    parameters = MigrationParameters()
    parameters.update({"downtime-limit": 20, "mode": "cpr-transfer"})
    parameters.update({"max-bandwidth": 0})
    changed = {"downtime-limit": 20, "mode": "cpr-transfer", "max-bandwidth": 0}
    assert unstructure(parameters.query()) == DEFAULTS | changed
    assert (parameters.mode, parameters["downtime-limit"], parameters["max-bandwidth"]) == ("cpr-transfer", 20, 0)


@pytest.mark.parametrize("bad", [{"downtime-limit": -1}, {"multifd-channels": 17}, {"mode": "warp"}, {"warp": 9}])
def test_an_update_is_all_or_nothing(bad: dict[str, Any]) -> None:
    parameters = MigrationParameters()
    with pytest.raises((OptionInvalid, Unsupported)):
        parameters.update({"avail-switchover-bandwidth": 7, **bad, "max-bandwidth": 1})
    assert unstructure(parameters.query()) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("downtime-limit", 2_000_001, "2000001 is not an integer from 0 to 2000000 ms"),
        ("downtime-limit", True, "True is not an integer from 0 to 2000000 ms"),
        ("downtime-limit", "5", "'5' is not an integer from 0 to 2000000 ms"),
        ("throttle-trigger-threshold", 0, "0 is not an integer from 1 to 100 percent"),
        ("cpu-throttle-initial", 100, "100 is not an integer from 1 to 99 percent"),
        ("cpu-throttle-increment", 0, "0 is not an integer from 1 to 99 percent"),
        ("max-cpu-throttle", 100, "100 is not an integer from 1 to 99 percent"),
        ("max-cpu-throttle", 19, "19 is not an integer from cpu-throttle-initial, 20, to 99 percent"),
        ("cpu-throttle-tailslow", 1, "1 is not true or false"),
        ("announce-initial", 100_001, "100001 is not an integer from 0 to 100000 ms"),
        ("announce-max", 100_001, "100001 is not an integer from 0 to 100000 ms"),
        ("announce-rounds", 1001, "1001 is not an integer from 0 to 1000"),
        ("announce-step", 10_001, "10001 is not an integer from 0 to 10000 ms"),
        ("max-bandwidth", 1 << 64, "18446744073709551616 is not an integer from 0 to 18446744073709551615 bytes/s"),
        ("x-checkpoint-delay", 1 << 32, "4294967296 is not an integer from 0 to 4294967295 ms"),
        ("multifd-channels", 0, "0 is not an integer from 1 to 16"),
        ("multifd-channels", 256, "256 is not an integer from 1 to 16"),
        ("xbzrle-cache-size", 4095, "4095 is not a power of two from 4096 to 9223372036854775808 bytes"),
        ("xbzrle-cache-size", 4097, "4097 is not a power of two from 4096 to 9223372036854775808 bytes"),
        ("multifd-compression", "lz4", "'lz4' is not one of none, zlib, zstd"),
        ("multifd-zlib-level", 10, "10 is not an integer from 0 to 9"),
        ("multifd-qatzip-level", 0, "0 is not an integer from 1 to 9"),
        ("multifd-zstd-level", 21, "21 is not an integer from 0 to 20"),
        ("x-vcpu-dirty-limit-period", 1001, "1001 is not an integer from 1 to 1000 ms"),
        ("vcpu-dirty-limit", 0, "0 is not an integer from 1 to 18446744073709551615 MB/s"),
        ("mode", "warp", "'warp' is not one of normal, cpr-reboot, cpr-transfer, cpr-exec"),
        ("zero-page-detection", "all", "'all' is not one of none, legacy, multifd"),
        ("direct-io", "on", "'on' is not true or false"),
        ("x-rdma-chunk-size", 3 << 20, "3145728 is not a power of two from 1048576 to 1073741824 bytes"),
        ("cpr-exec-command", ["vmm", 1], "['vmm', 1] is not a list of strings"),
        ("tls-creds", 5, "5 is not a string"),
        ("block-bitmap-mapping", "x", "'x' is not a list of node mappings"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(name: str, value: object, wanted: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        MigrationParameters().update({name: value})
    assert str(caught.value) == f"Migration parameter {name}: {wanted}"


def test_the_two_limits_of_the_throttle_are_checked_together() -> None:
    with pytest.raises(OptionInvalid) as caught:
        MigrationParameters().update({"cpu-throttle-initial": 60, "max-cpu-throttle": 50})
    expected = "Migration parameter max-cpu-throttle: 50 is not an integer from cpu-throttle-initial, 60, to 99 percent"
    assert str(caught.value) == expected


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(OptionInvalid) as caught:
        MigrationParameters().update({"warp": 9})
    assert str(caught.value) == "Migration parameter: 'warp' is not one that query-migrate-parameters lists"


OTHERS: dict[str, Any] = {
    "announce-initial": 51,
    "announce-max": 551,
    "announce-rounds": 6,
    "announce-step": 101,
    "tls-authz": "authz0",
    "x-checkpoint-delay": 1,
    "xbzrle-cache-size": 4096,
    "multifd-qatzip-level": 2,
    "direct-io": True,
    "x-rdma-chunk-size": 2 << 20,
}


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_an_unsupported_parameter_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(Unsupported) as caught:
        MigrationParameters().update({name: value})
    assert str(caught.value) == (
        f"Migration parameter {name!r} is not supported here; leave it at its default, {DEFAULTS[name]!r}"
    )


@pytest.mark.parametrize(("name", "value"), [("block-bitmap-mapping", [{"node-name": "n", "alias": "a"}])])
def test_an_unsupported_list_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(Unsupported) as caught:
        MigrationParameters().update({name: value})
    assert str(caught.value) == f"Migration parameter {name!r} is not supported here; leave it out"


def test_every_parameter_is_supported_or_refused() -> None:
    supported = {parameter.name for parameter in PARAMETERS if parameter.supported}
    assert supported == {
        *("max-bandwidth", "avail-switchover-bandwidth", "downtime-limit", "mode", "cpr-exec-command"),
        *("migrate-sessions", "x-keep-source", "x-restore-on-demand", "tls-creds", "tls-hostname"),
        *("throttle-trigger-threshold", "cpu-throttle-initial", "cpu-throttle-increment", "cpu-throttle-tailslow"),
        *("multifd-channels", "multifd-compression", "multifd-zlib-level", "multifd-zstd-level", "zero-page-detection"),
        *("max-cpu-throttle", "x-vcpu-dirty-limit-period", "vcpu-dirty-limit", "max-postcopy-bandwidth"),
    }
    lists = {"block-bitmap-mapping"}
    assert supported | OTHERS.keys() | lists == {parameter.name for parameter in PARAMETERS}


def test_every_mode_that_qemu_has_is_there() -> None:
    parameters = MigrationParameters()
    for mode in get_args(MigrationMode):
        parameters.update({"mode": mode})
        assert parameters.mode == mode


def test_block_bitmap_mapping_is_shown_once_it_was_set() -> None:
    parameters = MigrationParameters()
    assert parameters["block-bitmap-mapping"] is None
    parameters.update({"block-bitmap-mapping": []})
    assert unstructure(parameters.query()) == DEFAULTS | {"block-bitmap-mapping": []}


def test_whoever_looks_at_the_values_sees_them_change() -> None:
    parameters = MigrationParameters()
    values = parameters.values
    parameters.update({"downtime-limit": 7})
    assert values["downtime-limit"] == 7
    parameters.lend({"downtime-limit": 8})
    assert values["downtime-limit"] == 8
    parameters.give_back()
    assert values["downtime-limit"] == 7
    assert dict(values) == {name: values[name] for name in values}
    assert len(values) == len(dict(values))


def test_two_machines_share_no_values() -> None:
    one, other = MigrationParameters(), MigrationParameters()
    one.update({"downtime-limit": 1})
    assert other["downtime-limit"] == 300
    assert one["cpr-exec-command"] is not other["cpr-exec-command"]


def test_arguments_come_by_wire_name_and_null_is_no_text() -> None:
    request = {"downtime-limit": 20, "tls-creds": None, "mode": "cpr-transfer", "x-checkpoint-delay": 20000}
    arguments = structure(ParameterValues, request, "migrate-set-parameters")
    assert isinstance(arguments, ParameterValues)
    expected = {"tls-creds": "", "downtime-limit": 20, "x-checkpoint-delay": 20000, "mode": "cpr-transfer"}
    assert arguments.changes() == expected
    MigrationParameters().update(arguments.changes())


# --- for one migration alone ------------------------------------------------------------------------------


def test_what_is_lent_is_given_back_and_what_is_set_meanwhile_stays() -> None:
    parameters = MigrationParameters()
    parameters.update({"downtime-limit": 20})
    parameters.lend({"downtime-limit": 30, "max-bandwidth": 5, "mode": "cpr-transfer"})
    assert (parameters["downtime-limit"], parameters["max-bandwidth"], parameters.mode) == (30, 5, "cpr-transfer")
    parameters.update({"max-bandwidth": 6})
    parameters.give_back()
    assert (parameters["downtime-limit"], parameters["max-bandwidth"], parameters.mode) == (20, 6, "normal")


def test_a_loan_is_all_or_nothing() -> None:
    parameters = MigrationParameters()
    before = parameters.query()
    for bad in ({"max-bandwidth": 1, "downtime-limit": -1}, {"max-bandwidth": 1, "direct-io": True}, {"no-such": 1}):
        with pytest.raises((OptionInvalid, Unsupported)):
            parameters.lend(bad)
        assert parameters.query() == before
    parameters.lend({"max-bandwidth": 1})
    parameters.give_back()
    assert parameters.query() == before


def test_a_value_without_a_default_that_was_lent_is_unset_again() -> None:
    parameters = MigrationParameters()
    parameters.lend({"block-bitmap-mapping": []})
    assert parameters["block-bitmap-mapping"] == []
    parameters.give_back()
    assert parameters.query().block_bitmap_mapping is None
