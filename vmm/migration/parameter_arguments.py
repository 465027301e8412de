"""QEMU's MigrationParameters: the arguments of `migrate-set-parameters`, and what `query-migrate-parameters` replies.

Ranges and defaults are in `vmm.migration.parameter_table`; the annotations (`vmm.monitor.qapi`) say what the wire has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, final

import attrs

from vmm.monitor.qapi import NULL, U8, U32, U64, Null, Size

MigrationMode = Literal["normal", "cpr-reboot", "cpr-transfer", "cpr-exec"]
MultifdCompression = Literal["none", "zlib", "zstd", "qatzip", "qpl", "uadk"]
ZeroPageDetection = Literal["none", "legacy", "multifd"]
TextOrNull: TypeAlias = str | Null

_UNSTABLE: Final[Mapping[str, tuple[str, ...]]] = {"features": ("unstable",)}


@final
@attrs.frozen(kw_only=True)
class BitmapTransform:
    """What happens to a dirty bitmap on its way."""

    persistent: bool | None = None


@final
@attrs.frozen(kw_only=True)
class BitmapAlias:
    """The name of a dirty bitmap in the stream."""

    name: str
    alias: str
    transform: BitmapTransform | None = None


@final
@attrs.frozen(kw_only=True)
class BitmapNodeAlias:
    """The name of a block node in the stream, and of its dirty bitmaps."""

    node_name: str
    alias: str
    bitmaps: list[BitmapAlias]


@final
@attrs.frozen(kw_only=True)
class ParameterValues:
    """Some or all migration parameters; None stands for one that is not given."""

    announce_initial: Size | None = None
    announce_max: Size | None = None
    announce_rounds: Size | None = None
    announce_step: Size | None = None
    throttle_trigger_threshold: U8 | None = None
    cpu_throttle_initial: U8 | None = None
    cpu_throttle_increment: U8 | None = None
    cpu_throttle_tailslow: bool | None = None
    tls_creds: TextOrNull | None = None
    tls_hostname: TextOrNull | None = None
    tls_authz: TextOrNull | None = None
    max_bandwidth: Size | None = None
    avail_switchover_bandwidth: Size | None = None
    downtime_limit: U64 | None = None
    x_checkpoint_delay: U32 | None = attrs.field(default=None, metadata=_UNSTABLE)
    multifd_channels: U8 | None = None
    xbzrle_cache_size: Size | None = None
    max_postcopy_bandwidth: Size | None = None
    max_cpu_throttle: U8 | None = None
    multifd_compression: MultifdCompression | None = None
    multifd_zlib_level: U8 | None = None
    multifd_qatzip_level: U8 | None = None
    multifd_zstd_level: U8 | None = None
    block_bitmap_mapping: list[BitmapNodeAlias] | None = None
    x_vcpu_dirty_limit_period: U64 | None = attrs.field(default=None, metadata=_UNSTABLE)
    vcpu_dirty_limit: U64 | None = None
    mode: MigrationMode | None = None
    zero_page_detection: ZeroPageDetection | None = None
    direct_io: bool | None = None
    x_rdma_chunk_size: U64 | None = attrs.field(default=None, metadata=_UNSTABLE)
    cpr_exec_command: list[str] | None = None
    migrate_sessions: bool | None = None
    """Whether connected monitor sessions go along with a live update. Not in QEMU."""
    x_keep_source: bool | None = None
    """After a live update the process that had the guest waits, ready to take it back (`x-cpr-undo`). Not in QEMU."""
    x_restore_on_demand: bool | None = None
    """RAM at fixed places of a file comes as it is used: the guest runs at once. Not in QEMU."""

    def changes(self) -> dict[str, Any]:
        """Return the given ones by wire name. JSON's null, which QEMU takes for no text, has become no text."""
        values = ((field.name, getattr(self, field.name)) for field in attrs.fields(type(self)))
        return {name.replace("_", "-"): "" if value is NULL else value for name, value in values if value is not None}


SetMigrationParameters: TypeAlias = ParameterValues
"""The arguments of `migrate-set-parameters`: QEMU has one struct for both."""
