"""The CPR channel: messages with named descriptors over a unix stream socket.

A message is a frame (`vmm.cpr.frames`). Where it has more descriptors than one can carry, they come before it in
frames of kind ``more``. Of those the first has no descriptor and says how many are ``announced``, so that the receiver
can make room, or refuse.

A pidfd stays with its process when the pid is used again; it polls readable once the process has died.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm import host_sockets, hostio
from vmm.cpr.frames import FDS_PER_FRAME, TAKING, FrameBroken, FramesEnded, FrameSocket
from vmm.cpr.room import make_room
from vmm.cpr.versions import OLDEST, agreed, disagreement, spoken
from vmm.errors import (
    CprError,
    CprHostFailed,
    CprPeerGone,
    CprRefused,
    DescriptorMissing,
    DescriptorWrongKind,
    TooManyDescriptors,
    VmmError,
    leaves,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_MAX_FDS: Final = 1024
"""Descriptors of a message that were not announced."""

_MAX_ANNOUNCED: Final = 1 << 16


@final
@attrs.define(eq=False)
class Message:
    """One message. Descriptors that nobody claims are closed by `close`."""

    kind: str
    body: dict[str, Any]
    descriptors: dict[str, int] = attrs.Factory(dict)

    def claim(self, name: str) -> int:
        """Take descriptor `name` out of the message. Raises `DescriptorMissing`."""
        if name not in self.descriptors:
            raise DescriptorMissing(name=name)
        return self.descriptors.pop(name)

    def close(self) -> None:
        """Close the descriptors that were not claimed."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()


@final
class CprChannel:
    """One end of a channel. Owns the socket.

    `peer` and `peer_pid` say who is on the other side, once `hello` has been exchanged.
    """

    def __init__(
        self, sock: trio.socket.SocketType, *, side: str, peer: str, uids: Collection[int] = frozenset()
    ) -> None:
        """Args: `uids` are admitted besides root and this process's own."""
        # Not trio's any more: its calls give way to every other task even where there is nothing to wait for.
        self._frames: Final = FrameSocket(socket.socket(fileno=sock.detach()))
        self._sock: Final = self._frames.sock
        self.side: Final = side
        self.peer: Final = peer
        self._uids: Final = frozenset(uids)
        self.step = "hello"
        """What is being done, for error texts."""
        self.version = OLDEST
        """Of the protocol, as both speak it."""
        self.has_refused = False
        """Whether the peer has been told that this side will not go on."""
        self.peer_hello: Mapping[str, Any] = {}
        """What the peer said in its hello, unchecked."""
        self.peer_pid = 0
        self._peer_pidfd = -1

    def hurry(self) -> None:
        """Give no turn of the loop away from now on where there is nothing to wait for: in the guest's pause."""
        self._frames.hurries = True

    # Sending.

    async def send(self, kind: str, body: Mapping[str, Any], descriptors: Mapping[str, int] | None = None) -> None:
        """Send one message. The descriptors stay the caller's. Raises `CprPeerGone`."""
        items = list((descriptors or {}).items())
        if len(items) > FDS_PER_FRAME:
            await self._send_frame("more", {"announced": len(items)}, [])
        first = 0
        while len(items) - first > FDS_PER_FRAME:
            await self._send_frame("more", {}, items[first : first + FDS_PER_FRAME])
            first += FDS_PER_FRAME
        await self._send_frame(kind, body, items[first:])

    async def _send_frame(self, kind: str, body: Mapping[str, Any], items: list[tuple[str, int]]) -> None:
        try:
            await self._frames.send(kind, body, items)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise self._host_failed(self._all_in_flight(len(items))) from error
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise self._host_failed(f"{len(items)} descriptors cannot be sent: {error.strerror}") from error
            raise await self._last_words() from error

    def _all_in_flight(self, count: int) -> str:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"{count} descriptors cannot be sent: this user has as many in flight as RLIMIT_NOFILE admits ({limit}), "
            f"and nobody took one within {TAKING:g} s; `ulimit -n` of the {self.side} must be larger"
        )

    async def _last_words(self) -> CprError:
        """Return what the peer said before it closed the channel, if it refused; else, that it closed it."""
        with trio.move_on_after(1):
            while True:
                try:
                    await self.receive()
                except CprPeerGone as gone:
                    return gone
                except CprRefused as refused:
                    if refused.side == self.peer:
                        return refused
        return self._gone("closed the channel")

    # Receiving.

    async def receive(self, *kinds: str) -> Message:
        """Wait for the next message, which must be of one of `kinds` (or `refused`).

        Raises:
            CprRefused: the peer refused, or sent what is no message of this protocol.
            CprPeerGone: the channel ended.
        """
        descriptors: dict[str, int] = {}
        most = _MAX_FDS
        try:
            while True:
                kind, body, names = await self._receive_frame()
                if kind == "more" and "announced" in body:
                    most = await self._room_for(body["announced"])
                for name in names:
                    if not self._frames.descriptors:
                        raise self._broken(f"descriptor {name!r} was announced and not sent")
                    if name in descriptors:
                        raise self._broken(f"descriptor {name!r} was sent twice")
                    descriptors[name] = self._frames.descriptors.popleft()
                if len(descriptors) > most:
                    raise self._broken(f"more than {most} descriptors were sent")
                if self._frames.descriptors:
                    raise self._broken(f"{len(self._frames.descriptors)} descriptors came without a name")
                if kind != "more":
                    break
        except BaseException:
            for fd in descriptors.values():
                os.close(fd)
            raise
        message = Message(kind, body, descriptors)
        if kind in kinds:
            return message
        message.close()
        if kind == "refused":
            raise CprRefused(side=self.peer, step=str(body.get("step")), reason=str(body.get("reason")))
        raise self._broken(f"message {kind!r} came where {' or '.join(kinds) or 'none'} was due")

    async def _receive_frame(self) -> tuple[str, dict[str, Any], list[str]]:
        try:
            return await self._frames.receive()
        except FrameBroken as error:
            raise self._broken(str(error)) from error
        except FramesEnded as error:
            raise self._gone("closed the channel") from error

    async def _room_for(self, announced: object) -> int:
        """Make room for so many descriptors. What cannot be is refused, and the peer told before it sends one."""
        if type(announced) is not int or not 0 <= announced <= _MAX_ANNOUNCED:
            raise await self.refuse(f"{announced!r} descriptors are announced; at most {_MAX_ANNOUNCED} can come")
        try:
            make_room(announced)
        except TooManyDescriptors as error:
            raise await self.refuse(str(error)) from error
        return announced

    async def wait_for_any(self) -> None:
        """Wait until there is something to `receive`, be it the end."""
        await self._frames.wait_for_any()

    async def watch(self) -> None:
        """Wait until the peer refuses or the channel ends, which is raised; a message that comes is an error too.

        For the time in which nothing is due: to be cancelled once something is.
        """
        await self.receive()

    # Who is there.

    async def admit(self) -> None:
        """Look who connected, before a byte of it is read. For the side that accepted the connection.

        An inherited socket names the wrong process: `hello` asks again, for a proof.

        Raises:
            CprRefused: another user, who was told so.
        """
        await trio.lowlevel.checkpoint()
        await self._require_admitted(host_sockets.peer_credentials(self._sock)[1])

    def admits(self, sock: socket.socket) -> bool:
        """Say whether `sock`, which is connected, may be the peer's as well: of the same users, where that is known."""
        return sock.family != socket.AF_UNIX or self._admits(host_sockets.peer_credentials(sock)[1])

    def _admits(self, uid: int) -> bool:
        return uid in {0, os.getuid()} | self._uids

    async def _require_admitted(self, uid: int) -> None:
        if not self._admits(uid):
            admitted = ", ".join(f"uid {one}" for one in (os.getuid(), *sorted(self._uids)))
            raise await self.refuse(f"the {self.peer} runs as uid {uid}; only {admitted} and root are admitted")

    async def hello(self, program: str, more: Mapping[str, Any] | None = None) -> None:
        """Exchange versions and identities. Both sides call it first; the peer's pidfd is kept from then on.

        Args:
            more: members of the message besides, which the peer finds in its `peer_hello`.

        Raises:
            CprRefused: another protocol version, another user, or a pidfd of some other process.
        """
        try:
            pidfd = os.pidfd_open(os.getpid())
        except OSError as error:
            raise self._host_failed(f"a pidfd cannot be opened: {error.strerror}") from error
        try:
            body = {**(more or {}), **spoken(), "program": program, "side": self.side}
            await self.send("hello", body, {"pidfd": pidfd})
        finally:
            os.close(pidfd)
        message = await self.receive("hello")
        try:
            version = agreed(message.body)
            if version is None:
                raise await self.refuse(disagreement(message.body, self.peer))
            self.version = version
            self.peer_hello = message.body
            assert self._frames.sender is not None, "SO_PASSCRED is on before the first byte is read"
            pid, uid, _gid = self._frames.sender
            await self._require_admitted(uid)
            try:
                self._peer_pidfd = message.claim("pidfd")
                named = _pid_of(self._peer_pidfd)
            except (DescriptorMissing, DescriptorWrongKind) as error:
                raise await self.refuse(str(error)) from error
            if named != pid:
                raise await self.refuse(f"the pidfd sent is of process {named}, but process {pid} sent it")
            self.peer_pid = pid
        finally:
            message.close()

    async def refuse(self, reason: str) -> CprRefused:
        """Tell the peer that this side will not go on, if it still listens; return the error to raise."""
        self.has_refused = True
        with trio.move_on_after(1, shield=True), suppress(CprError):
            await self.send("refused", {"step": self.step, "reason": reason})
        return CprRefused(side=self.side, step=self.step, reason=reason)

    def blame(self, error: BaseException) -> VmmError:
        """Return what has ended this side's attempt: the first error of `error` that has a sentence, or one about it.

        For what the host may refuse anywhere, an `OSError` or `MemoryError`: a guest is not worth an unforeseen one.
        """
        found = list(leaves(error))
        told = next((leaf for leaf in found if isinstance(leaf, VmmError)), None)
        if told is not None:
            return told
        return self._host_failed(getattr(found[0], "strerror", None) or "no memory is left")

    def peer_is_dead(self) -> bool:
        """Say whether the peer's process has died. False as long as it is not known who the peer is."""
        if self._peer_pidfd < 0:
            return False
        import select  # Not needed before a live update.

        poll = select.poll()
        poll.register(self._peer_pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def peer_died(self) -> None:
        """Wait until the peer's process has died."""
        await trio.lowlevel.wait_readable(self._peer_pidfd)

    def leash(self) -> int:
        """Return a copy of the socket: as long as a side has one open, the other side's copy tells nothing.

        Raises:
            HostFileRefused: the host has no descriptor left.
        """
        return hostio.dup(self._sock.fileno())

    def _gone(self, what: str) -> CprPeerGone:
        outcome = "the guest stays where it was" if self.side == "source" else "nothing was taken over"
        return CprPeerGone(peer=self.peer, what=what, step=self.step, outcome=outcome)

    def _host_failed(self, reason: str) -> CprHostFailed:
        return CprHostFailed(side=self.side, step=self.step, reason=reason)

    def _broken(self, reason: str) -> CprRefused:
        return CprRefused(side=self.side, step=self.step, reason=reason)

    def close(self) -> None:
        """Close the socket, the peer's pidfd and descriptors that came without a message. Idempotent."""
        self._frames.close()
        if self._peer_pidfd >= 0:
            trio.lowlevel.notify_closing(self._peer_pidfd)
            os.close(self._peer_pidfd)
            self._peer_pidfd = -1


def _pid_of(pidfd: int) -> int:
    """Return the process that `pidfd` refers to. Source: proc(5), fdinfo of a pidfd."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}") as info:
            for line in info:
                if line.startswith("Pid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    raise DescriptorWrongKind(name="pidfd", found="something else", wanted="a pidfd")
