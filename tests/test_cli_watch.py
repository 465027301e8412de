"""What a signal does to who watches a migration."""

from __future__ import annotations

import os
import signal
from typing import Final

import pytest
import trio

from vmm.cli_watch import Interrupted, Interruption, interruptible
from vmm.errors import InvalidState, VmmError

pytestmark = pytest.mark.usefixtures("no_leaks")

HANGS: Final = 30.0

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run(signals: int, number: signal.Signals = signal.SIGINT) -> tuple[Interruption, str]:
    """Send this process so many signals while something is under way that the first one calls off."""
    interruption, seen = Interruption(), list[str]()

    async def work() -> str:
        os.kill(os.getpid(), number)
        with trio.fail_after(HANGS):
            while not interruption.came:
                with interruption.ends_wait(True):
                    await trio.sleep_forever()
            seen.append("called off")
            if signals > 1:
                os.kill(os.getpid(), number)
                with interruption.ends_wait(False):
                    await trio.sleep_forever()
        return "done"

    try:
        return interruption, await interruptible("The migration", work, interruption)
    except Interrupted as error:
        assert seen == ["called off"]
        return interruption, str(error)


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_is_told_and_what_is_under_way_ends_by_itself(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    interruption, result = await run(1, number)
    assert result == "done"
    assert interruption.told(Interrupted(what="The save", outcome="the machine goes on")) == 128 + number
    assert capsys.readouterr().err == "trio-vmm: The save was interrupted: the machine goes on\n"


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_second_one_waits_for_nothing(number: signal.Signals) -> None:
    _, result = await run(2, number)
    assert result == (
        "The migration was interrupted: what comes of it is not known here; "
        "query-migrate on the machine's monitor tells"
    )


async def test_a_failure_comes_out_alone() -> None:
    error = InvalidState(what="a", state="b", instead="c")

    async def work() -> None:
        raise error

    with pytest.raises(VmmError) as caught:
        await interruptible("The save", work, Interruption())
    assert caught.value is error
