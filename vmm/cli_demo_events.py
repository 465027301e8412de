"""What `trio-vmm demo` makes of a monitor's events: which window opened and closed when, with which tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmm.cli_demo_screen import Screen

OLD: Final = "old"
NEW: Final = "new"

_RUN_STATES: Final[Mapping[str, str]] = {"STOP": "the guest stands", "RESUME": "the guest runs"}


@final
@attrs.frozen
class Moment:
    """An event of one process, by the wall clock that all of them share."""

    at: float
    """Milliseconds."""
    side: str
    event: str
    data: dict[str, Any]

    @classmethod
    def of(cls, side: str, message: dict[str, Any]) -> Moment:
        """Read an event as it came from a monitor."""
        stamp = message["timestamp"]
        at = stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3
        return cls(at, side, message["event"], message.get("data", {}))

    @property
    def phase(self) -> str:
        """Name of the phase that it is about; empty if it is about none."""
        return str(self.data.get("phase", ""))


@final
@attrs.frozen
class Change:
    """What happened at once to one window, or to the guest."""

    at: float
    side: str
    kind: str
    """TOKEN_GRANTED, TOKEN_REVOKED, STOP or RESUME."""
    phase: str
    tokens: list[str]


def token_name(info: Mapping[str, Any]) -> str:
    """Return a token without its `may-`, which stands before all of them, and with its scope."""
    name = str(info["token"]).removeprefix("may-")
    return f"{name} ({', '.join(info['scope'])})" if info.get("scope") else name


def changes(moments: Iterable[Moment]) -> list[Change]:
    """Gather `moments`, which are in order, window by window."""
    found: list[Change] = []
    last: dict[tuple[str, str], Change] = {}
    for moment in moments:
        window = (moment.side, moment.phase)
        if moment.event in ("TOKEN_GRANTED", "TOKEN_REVOKED"):
            if window not in last or last[window].kind != moment.event:
                last[window] = Change(moment.at, moment.side, moment.event, moment.phase, [])
                found.append(last[window])
            last[window].tokens.append(token_name(moment.data))
        elif moment.event in _RUN_STATES:
            found.append(Change(moment.at, moment.side, moment.event, "", []))
        elif moment.event == "PHASE_CHANGED" and moment.data["opened"] and moment.phase == "postmigrate":
            # The one phase that has no window.
            found.append(Change(moment.at, moment.side, "TOKEN_GRANTED", moment.phase, []))
    return found


def may(tokens: list[str]) -> str:
    """Say what a window allows."""
    return f"may {', '.join(tokens)}" if tokens else "no tokens; its monitor still answers"


def revoked(count: int) -> str:
    """Say that so many tokens have been revoked."""
    return f"{count} token{'s' if count != 1 else ''} revoked"


def show(screen: Screen, found: Iterable[Change]) -> None:
    """Show windows as they open and close."""
    for change in found:
        if change.kind == "TOKEN_GRANTED":
            screen.opened([change.phase], may(change.tokens))
        elif change.kind == "TOKEN_REVOKED":
            screen.closed([change.phase], revoked(len(change.tokens)))
        else:
            screen.event(change.kind, _RUN_STATES[change.kind])


def show_timeline(screen: Screen, moments: Iterable[Moment], known: frozenset[str]) -> tuple[float, float]:
    """Show a live update: both processes by one clock, whose zero is when the guest began to be stopped.

    Phases of the new process that are in `known` are the same as they were in the old one: they are only named. Its
    windows' closing is left out. Returns when the pause began and when it ended, in ms by the wall clock.
    """
    ordered = sorted(moments, key=lambda moment: moment.at)
    zero = next(m.at for m in ordered if m.event == "PHASE_CHANGED" and m.phase == "quiesced")
    rows: list[tuple[Change, list[str]]] = []
    for change in changes(ordered):
        if change.side == NEW and change.kind == "TOKEN_REVOKED":
            continue
        before = rows[-1][0] if rows else None
        together = before is not None and (before.side, before.kind) == (change.side, change.kind)
        if together and change.kind == "TOKEN_REVOKED":
            rows[-1][0].tokens.extend(change.tokens)
            rows[-1][1].append(change.phase)
        elif together and change.phase in known and rows[-1][1][-1] in known:
            rows[-1][1].append(change.phase)
        else:
            rows.append((change, [change.phase]))
    for change, phases in rows:
        margin = f"{change.at - zero:8.1f}  {change.side}  "
        if change.kind == "TOKEN_GRANTED":
            again = change.side == NEW and phases[0] in known
            screen.opened(phases, "as before" if again else may(change.tokens), margin=margin)
        elif change.kind == "TOKEN_REVOKED":
            screen.closed(phases, revoked(len(change.tokens)), margin=margin)
        else:
            screen.event(change.kind, _RUN_STATES[change.kind], margin=margin)
    return zero, next(m.at for m in ordered if m.event == "RESUME")
