"""Pages of guest RAM that come from a file when they are used, or go into one before they change.

The work is done by threads in C (faults.c), which never wait for the interpreter; here they are begun, watched and
ended. Source: userfaultfd(2), Linux Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm import hostio
from vmm.errors import HostFileRefused, MigrationPeerGone, PageFaultsUnavailable, VmmError
from vmm.kvm._faults import ffi, lib
from vmm.kvm.page_file import PAGE_SIZE, path_of
from vmm.kvm.page_map import PageMap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm.kvm._kvm import CData
    from vmm.kvm.memory import GuestMemory
    from vmm.kvm.page_file import PageFile

_ABSENT: Final = ("MISSING_SHMEM",)
LINK_FEATURES: Final = ("MISSING_SHMEM", "THREAD_ID")
"""What `PagesFromLink` needs, by the names of linux/userfaultfd.h."""
PATIENCE: Final = 5.0
"""Seconds that the loop waits, and answers nobody, for a page of a source that is there."""
KEPT_FEATURES: Final = ("PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")
"""What `KeptPages` needs, by the names of linux/userfaultfd.h."""


@final
@attrs.frozen
class FaultReport:
    """How far a server is."""

    faults: int
    """Pages that somebody waited for."""
    moved: int
    """Pages of content that have come, or gone."""
    passed: int
    """Pages that are done with, those that are zero included."""


class _Server(ABC):
    """A server of faults, from its threads' beginning to their end."""

    def __init__(self, memory: GuestMemory, action: str, file: PageFile | None = None) -> None:
        self._memory: Final = memory
        self._action: Final = action
        self._file: Final = file  # whose tables are C's as long as there is a server
        self._fd: Final = hostio.dup(file.fd) if file is not None else -1
        try:
            self._bell: Final = hostio.open_eventfd()
        except VmmError:
            if self._fd >= 0:
                os.close(self._fd)
            raise
        self._patience = 0.0
        self._server: CData | None = None
        self._idle: Final = threading.Condition()
        self._users = 0  # threads that use the server, which is there as long
        self._last = FaultReport(0, 0, 0)

    def _make(self, features: Iterable[str], make: Callable[[CData, CData], CData]) -> CData:
        """Have `make` make the server, from a plan, or say why not."""
        plan = ffi.new("struct tf_plan *")
        plan.base, plan.pages = self._memory.hva(0), self._memory.size // PAGE_SIZE
        plan.ram, plan.patience = self._memory.fd, round(self._patience * 1000)
        if self._file is not None:
            plan.fd, plan.offset = self._fd, self._file.offset
            # The other module's, and the same to C.
            plan.listed, plan.sums = ffi.cast("uint64_t *", self._file.listed), ffi.cast("uint32_t *", self._file.sums)
        error = ffi.new("int *")
        try:
            require_features(self._action, features)
            server = make(plan, error)
            if not server:
                raise self._refused(-error[0])
        except VmmError:
            self._close_descriptors()
            raise
        self._server = server
        return server

    def _close_descriptors(self) -> None:
        os.close(self._bell)
        if self._fd >= 0:
            os.close(self._fd)

    def _refused(self, error: int) -> PageFaultsUnavailable:
        reason = os.strerror(error)
        if error == errno.EINVAL:
            reason = "the guest's RAM must be a memfd or a file on tmpfs, in pages of 4096 bytes; it is something else"
        return PageFaultsUnavailable(action=self._action, reason=reason)

    def _state(self, server: CData | None = None) -> CData:
        server = server or self._server
        assert server is not None, "a server of faults was used after close()"
        report = ffi.new("struct tf_report *")
        lib.tf_report(server, report)
        return report

    def report(self) -> FaultReport:
        """Return how far it is, or was when it was closed."""
        with self._idle:  # another thread may be closing it
            if self._server is not None:
                state = self._state()
                self._last = FaultReport(state.faults, state.moved, state.passed)
            return self._last

    async def wait_over(self) -> VmmError | None:
        """Wait until all is done, or cannot be done; then return why. A cancellation changes nothing."""
        while (state := self._state()).state == lib.TF_RUNS:
            await trio.lowlevel.wait_readable(self._bell)
        return self._failure(state) if state.state == lib.TF_FAILED else None

    @abstractmethod
    def _failure(self, state: CData) -> VmmError:
        """Return what went wrong."""

    def _require(self, first: int, count: int) -> None:
        # Any thread, also while another one closes this: then nobody waits for anything any more.
        with self._idle:
            server = self._server
            if server is None:
                return
            self._users += 1
        try:
            if lib.tf_require(server, first, count):
                raise self._failure(self._state(server))
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def release(self) -> None:
        """Let everybody go on who waits. Idempotent."""
        if self._server is not None:
            lib.tf_release(self._server)

    def close(self) -> None:
        """Release, and end the threads. Idempotent."""
        self.report()
        with self._idle:
            server, self._server = self._server, None
        if server is not None:
            lib.tf_release(server)
            with self._idle:
                self._idle.wait_for(lambda: not self._users)
            lib.tf_free(server)
            self._close_descriptors()


@final
class PagesFromFile(_Server):
    """Pages that are not there yet come from a file: at once where somebody waits for them, the others meanwhile.

    If one cannot be had, nobody who waits for it is answered until `release`: then it is zero. So a guest must be taken
    out of its vCPUs first, or be kicked at least.
    """

    def __init__(self, memory: GuestMemory, file: PageFile) -> None:
        """Begin. The memory has been made zero (`GuestMemory.clear`), and nobody uses it yet.

        Raises:
            PageFaultsUnavailable: the host lacks what this takes.
        """
        super().__init__(memory, "have the guest's RAM come as it is used", file)
        self._make(_ABSENT, lambda plan, error: lib.tf_serve_file(plan, self._bell, error))
        memory.absent = self

    def require(self, first: int, count: int) -> None:
        """Wait, without the interpreter's lock, until these pages are there.

        Raises:
            GuestPageLost: one of them cannot be had, or one before.
        """
        self._require(first, count)

    def _failure(self, state: CData) -> VmmError:
        assert self._file is not None
        return self._file.lost(self._memory, state.page, state.error, state.found, self._fd)

    def close(self) -> None:
        """Release, and end the threads: what was absent is zero. Idempotent."""
        if self._memory.absent is self:
            self._memory.absent = None
        super().close()


@final
class KeptPages(_Server):
    """Pages go into a file as they are at one moment, however the guest changes them afterwards."""

    def __init__(self, memory: GuestMemory, file: PageFile) -> None:
        """Get ready, which takes long; the guest may run. For a thread.

        Raises:
            PageFaultsUnavailable: the host lacks what this takes.
        """
        super().__init__(memory, "keep the guest's RAM as it is while the guest runs", file)
        self._make(KEPT_FEATURES, lambda plan, error: lib.tf_protect(plan, self._bell, error))

    def begin(self) -> None:
        """Keep pages as they are now. The guest stands, and may run again when this returns.

        Raises:
            PageFaultsUnavailable: the host did not do it; the guest may run.
        """
        if error := lib.tf_begin_protection(self._server):
            raise self._refused(-error)

    def _failure(self, state: CData) -> VmmError:
        return HostFileRefused(action="write", path=path_of(self._fd), reason=os.strerror(-state.error))


@final
class PagesFromLink(_Server):
    """Pages that are not there yet come over a connection, those first that somebody waits for.

    If it breaks, everybody waits on, until there is another one (`relink`), or it is given up (`release`).
    """

    def __init__(
        self, memory: GuestMemory, here: PageMap, link: int, urgent: int | None, cpus: int, patience: float = PATIENCE
    ) -> None:
        """Begin. Pages that are not in `here` are absent (`GuestMemory.forget`), and nobody uses the memory yet.

        Args:
            link: a connected socket, to ask and to be answered by; it is copied.
            urgent: another one, by which comes what was asked for; likewise.
            cpus: number of vCPUs, for `waited`.
            patience: seconds that `require` waits for a page.

        Raises:
            PageFaultsUnavailable: the host lacks what this takes.
        """
        super().__init__(memory, "run the guest before all of its RAM is there")
        self._patience = patience
        self._links: list[int] = []
        words = ffi.cast("uint64_t *", here.words)
        try:
            link, rush = self._own(link, urgent)
        except VmmError:
            self._close_descriptors()
            raise
        try:
            self._make(
                LINK_FEATURES, lambda plan, error: lib.tf_serve_link(plan, words, link, rush, cpus, self._bell, error)
            )
        except VmmError:
            self._disown()
            raise
        memory.absent = self

    def _own(self, link: int, urgent: int | None) -> tuple[int, int]:
        """Return copies of two descriptors, for the threads to have as long as they run; -1 for None."""
        with ExitStack() as stack:
            links = []
            for fd in (link, urgent):
                if fd is not None:
                    links.append(hostio.dup(fd))
                    stack.callback(os.close, links[-1])
            stack.pop_all()
        self._links = links
        return links[0], -1 if urgent is None else links[1]

    def _disown(self) -> None:
        links, self._links = self._links, []
        for fd in links:
            os.close(fd)

    def require(self, first: int, count: int) -> None:
        """Wait, without the interpreter's lock, until these pages are there.

        Raises:
            MigrationPeerGone: the connection is broken, or it has been given up; or none came in time.
        """
        self._require(first, count)

    async def wait_changed(self) -> MigrationPeerGone | None:
        """Wait until all pages are there (None), or the connection is broken, and then return how."""
        while (state := self._state()).state == lib.TF_RUNS:
            await self._wait_rung()
        return None if state.state == lib.TF_COMPLETE else self._failure(state)

    def say_loaded(self) -> None:
        """Say that the guest's state is in force here.

        Raises:
            MigrationPeerGone: the connection broke before that was said, and the guest is the source's.
        """
        if lib.tf_say_loaded(self._server):
            raise self._failure(self._state(), "the guest stays there")

    async def wait_ours(self) -> MigrationPeerGone | None:
        """Wait until the source has let the guest go (None), or the connection is broken, and then return how."""
        while not (state := self._state()).ours:
            if state.state != lib.TF_RUNS:
                return self._failure(state)
            await self._wait_rung()
        return None

    async def _wait_rung(self) -> None:
        await trio.lowlevel.wait_readable(self._bell)
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def relink(self, link: int, urgent: int | None) -> None:
        """Go on over another connection. What was asked for and has not come is asked for again. For a thread.

        Raises:
            HostFileRefused: no descriptor is left. It is as it was before.
        """
        before = self._links
        lib.tf_relink(self._server, *self._own(link, urgent))
        for fd in before:
            os.close(fd)

    def here(self) -> PageMap:
        """Return the pages that are there."""
        pages = PageMap(self._memory.size // PAGE_SIZE)
        lib.tf_here(self._server, ffi.cast("uint64_t *", pages.words))
        return pages

    def asked(self) -> int:
        """Return how many pages were asked for."""
        return int(self._state().asked)

    def waited(self, thread: int = 0) -> int:
        """Return how long a thread has waited for pages, in ms; with 0, how long all vCPUs have at the same time."""
        return int(lib.tf_waited(self._server, thread)) // 1_000_000

    def _failure(
        self, state: CData, outcome: str = "the guest waits for its pages; see migrate-recover"
    ) -> MigrationPeerGone:
        known = {errno.EPIPE: "closed the connection", errno.EBADMSG: "sent damaged pages"}
        known[errno.ECONNRESET] = known[errno.EPIPE]
        known[errno.EPROTO] = "sent what are no pages of this guest"
        known[0] = f"has not sent a page within {self._patience:g} s"
        what = known.get(-state.error, f"is gone ({os.strerror(-state.error)})")
        return MigrationPeerGone(peer="source", what=what, outcome=outcome)

    def close(self) -> None:
        """Release, and end the threads: what was absent is zero. Idempotent."""
        if self._memory.absent is self:
            self._memory.absent = None
        super().close()
        self._disown()


def require_features(action: str, names: Iterable[str]) -> None:
    """Find out whether this process can answer page faults, with features of userfaultfd by these names.

    Raises:
        PageFaultsUnavailable: it cannot, to do `action`.
    """
    found = ffi.new("uint64_t *")
    error = -lib.tf_probe(found)
    lacking = [name for name in names if not found[0] & getattr(lib, f"UFFD_FEATURE_{name}")]
    if error == errno.EPERM:
        reason = (
            "this process may not use userfaultfd; it takes CAP_SYS_PTRACE, leave to open /dev/userfaultfd, or "
            "sysctl vm.unprivileged_userfaultfd=1"
        )
    elif error:
        reason = f"this host's kernel has no userfaultfd ({os.strerror(error)})"
    elif lacking:
        reason = f"this host's kernel has userfaultfd without {' and '.join(lacking)}"
    else:
        return
    raise PageFaultsUnavailable(action=action, reason=reason)
