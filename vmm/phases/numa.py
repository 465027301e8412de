"""The NUMA nodes of a machine that is being made, one `set-numa-node` after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, final

import attrs

from vmm.errors import OptionInvalid, Unsupported
from vmm.monitor.qapi import U8, U16, U32, U64, Size, Union

if TYPE_CHECKING:
    from vmm.hw.boot.numa import Numa

MAX_NODES: Final = 128
PAGE: Final = 4096


@final
@attrs.frozen(kw_only=True)
class NumaNodeOptions:
    """A node, with vCPUs by number and bytes of memory."""

    type: Literal["node"]
    nodeid: U16 | None = None
    """By default the number of nodes so far."""
    cpus: list[U16] = attrs.Factory(list)
    mem: Size = 0
    memdev: str | None = None
    initiator: U16 | None = None


@final
@attrs.frozen(kw_only=True)
class NumaDistOptions:
    """The distance from one node to another; the way back is as far, unless it has a distance of its own."""

    type: Literal["dist"]
    src: U16
    dst: U16
    val: U8


@final
@attrs.frozen(kw_only=True)
class NumaCpuOptions:
    """The node of all vCPUs that have these properties."""

    type: Literal["cpu"]
    node_id: int
    socket_id: int | None = None
    core_id: int | None = None
    thread_id: int | None = None
    drawer_id: int | None = None
    book_id: int | None = None
    die_id: int | None = None
    cluster_id: int | None = None
    module_id: int | None = None


@final
@attrs.frozen(kw_only=True)
class NumaHmatLBOptions:
    """QEMU's latency and bandwidth; refused."""

    type: Literal["hmat-lb"]
    initiator: U16 | None = None
    target: U16 | None = None
    hierarchy: Literal["memory", "first-level", "second-level", "third-level"] | None = None
    data_type: (
        Literal[
            "access-latency", "read-latency", "write-latency", "access-bandwidth", "read-bandwidth", "write-bandwidth"
        ]
        | None
    ) = None
    latency: U64 | None = None
    bandwidth: Size | None = None


@final
@attrs.frozen(kw_only=True)
class NumaHmatCacheOptions:
    """QEMU's memory-side cache; refused."""

    type: Literal["hmat-cache"]
    node_id: U32 | None = None
    size: Size | None = None
    level: U8 | None = None
    associativity: Literal["none", "direct", "complex"] | None = None
    policy: Literal["none", "write-back", "write-through"] | None = None
    line: U16 | None = None


NumaOptions = Annotated[
    NumaNodeOptions | NumaDistOptions | NumaCpuOptions | NumaHmatLBOptions | NumaHmatCacheOptions, Union("type")
]


@final
@attrs.frozen(kw_only=True)
class SetNumaNode:
    """Arguments of `set-numa-node`."""

    options: NumaOptions = attrs.field(metadata={"inline": True})


@final
class NumaTable:
    """The nodes so far, of a machine of `cpus` vCPUs and `memory` bytes. The facet of `may-set-numa`.

    Each command is checked whole and then carried out, or leaves all as it was. What only shows in the end, `complete`
    finds.
    """

    def __init__(self, cpus: int, memory: int) -> None:
        self._count: Final = cpus
        self._memory: Final = memory
        self._sizes: dict[int, int] = {}
        self._nodes: dict[int, int] = {}
        self._distances: dict[tuple[int, int], int] = {}

    def node_of(self, cpu: int) -> int | None:
        """Return the node of vCPU `cpu`: 0 if none was said, None in a machine without nodes."""
        return self._nodes.get(cpu, 0) if self._sizes else None

    def set(self, options: object) -> None:
        """Carry out one command.

        Raises:
            OptionInvalid: a node, a vCPU, a size or a distance cannot be as it is given.
            Unsupported: it has a part that is QEMU's alone.
        """
        match options:
            case NumaNodeOptions():
                self._add_node(options)
            case NumaDistOptions():
                self._set_distance(options)
            case NumaCpuOptions():
                self._place_cpus(options)
            case NumaHmatLBOptions() | NumaHmatCacheOptions():
                instead = "there are node, dist and cpu"
                raise Unsupported(what="NUMA option type", name=options.type, instead=instead)

    def _add_node(self, options: NumaNodeOptions) -> None:
        if options.memdev is not None:
            instead = "give mem, since there are no memory back ends"
            raise Unsupported(what="NUMA option", name="memdev", instead=instead)
        if options.initiator is not None:
            instead = "guests get no table of memory attributes (HMAT)"
            raise Unsupported(what="NUMA option", name="initiator", instead=instead)
        node = len(self._sizes) if options.nodeid is None else options.nodeid
        if node >= MAX_NODES:
            raise OptionInvalid(option="nodeid", value=node, wanted=f"a number of a node, 0 to {MAX_NODES - 1}")
        if node in self._sizes:
            raise OptionInvalid(option="nodeid", value=node, wanted="the number of a new node: it is there already")
        for cpu in options.cpus:
            if cpu >= self._count:
                wanted = f"the number of a vCPU, 0 to {self._count - 1}"
                raise OptionInvalid(option="cpus", value=cpu, wanted=wanted)
            self._require_free("cpus", cpu, node)
        if len(set(options.cpus)) < len(options.cpus):
            raise OptionInvalid(option="cpus", value=list(options.cpus), wanted="a list of different vCPUs")
        left = self._memory - sum(self._sizes.values())
        if options.mem % PAGE or options.mem > left:
            wanted = f"a multiple of 4 KiB up to {left}, what is left of the machine's memory"
            raise OptionInvalid(option="mem", value=options.mem, wanted=wanted)
        self._sizes[node] = options.mem
        self._nodes.update(dict.fromkeys(options.cpus, node))

    def _set_distance(self, options: NumaDistOptions) -> None:
        for member in ("src", "dst"):
            self._require_node(member, getattr(options, member))
        if options.src == options.dst and options.val != 10:
            raise OptionInvalid(option="val", value=options.val, wanted="10, the distance of a node from itself")
        if options.src != options.dst and options.val <= 10:
            raise OptionInvalid(option="val", value=options.val, wanted="a distance between two nodes, 11 to 255")
        self._distances[options.src, options.dst] = options.val

    def _place_cpus(self, options: NumaCpuOptions) -> None:
        for member in ("drawer_id", "book_id", "die_id", "cluster_id", "module_id"):
            if getattr(options, member) is not None:
                instead = "a vCPU has socket-id, core-id and thread-id"
                raise Unsupported(what="CPU property", name=member.replace("_", "-"), instead=instead)
        self._require_node("node-id", options.node_id)
        wanted = (options.socket_id, options.core_id, options.thread_id)
        found = [
            cpu
            for cpu in range(self._count)
            if all(one in (None, other) for one, other in zip(wanted, (0, cpu, 0), strict=True))
        ]
        if not found:
            names = ("socket-id", "core-id", "thread-id")
            given = ", ".join(f"{name}={value}" for name, value in zip(names, wanted, strict=True) if value is not None)
            there = "those of a vCPU; query-hotpluggable-cpus lists them"
            raise OptionInvalid(option="cpu", value=given, wanted=there)
        for cpu in found:
            self._require_free("cpu", cpu, options.node_id)
        self._nodes.update(dict.fromkeys(found, options.node_id))

    def _require_node(self, option: str, node: int) -> None:
        if node not in self._sizes:
            there = ", ".join(map(str, sorted(self._sizes))) or "none yet"
            raise OptionInvalid(option=option, value=node, wanted=f"a node; there are: {there}")

    def _require_free(self, option: str, cpu: int, node: int) -> None:
        if self._nodes.get(cpu, node) != node:
            raise OptionInvalid(option=option, value=cpu, wanted=f"free: it is in node {self._nodes[cpu]}")

    def complete(self) -> Numa | None:
        """Return the nodes, None if there are none.

        Raises:
            OptionInvalid: a number is left out, or memory is not in any node, or a pair of nodes has no distance.
        """
        if not self._sizes:
            return None
        from vmm.hw.boot.numa import LOCAL, REMOTE, Numa  # few machines have nodes

        command = "set-numa-node"
        numbers = range(len(self._sizes))
        if set(self._sizes) != set(numbers):
            missing = min(set(numbers) - set(self._sizes))
            wanted = f"a complete list of nodes: {missing} is missing"
            raise OptionInvalid(option=command, value=sorted(self._sizes), wanted=wanted)
        total = sum(self._sizes.values())
        if total != self._memory:
            wanted = f"all of the machine's memory: its nodes must have {self._memory} bytes together"
            raise OptionInvalid(option=command, value=total, wanted=wanted)
        rows = []
        for src in numbers:
            row = []
            for dst in numbers:
                there = self._distances.get((src, dst), self._distances.get((dst, src)))
                if there is None and src != dst and any(one != other for one, other in self._distances):
                    wanted = "a pair of nodes with a distance, which all pairs have or none"
                    raise OptionInvalid(option=command, value=[src, dst], wanted=wanted)
                row.append(there or (LOCAL if src == dst else REMOTE))
            rows.append(tuple(row))
        cpus = tuple(self._nodes.get(cpu, 0) for cpu in range(self._count))
        return Numa(cpus, tuple(self._sizes[node] for node in numbers), tuple(rows))
