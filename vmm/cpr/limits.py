"""How long one side of a live update waits for the other.

All of it is for peers that are alive and do nothing. One that has died, or closed its channel, is noticed at once.
"""

from __future__ import annotations

from typing import final

import attrs

from vmm.errors import OptionInvalid


@final
@attrs.frozen
class CprLimits:
    """Limits in seconds. Those of the pause bound what a stalled destination can cost the guest."""

    describing: float = 10.0
    """The destination's, for a source that has connected, also to copy its guest, to say what its machine is."""
    checking: float = 10.0
    """The source's, for the answer to `x-cpr-check`: the guest runs on."""
    building: float = 120.0
    """The source's, for each thing that a destination does before the guest is paused: generous, since it runs on."""
    loading: float = 2.0
    """The source's, for the destination to load the state. The guest is paused."""
    taking: float = 1.0
    """The source's: how long its offer stands. The guest is paused."""

    @classmethod
    def parse(cls, text: str) -> CprLimits:
        """Read `NAME=SECONDS,...`; what is not named has its default. Raises `OptionInvalid`."""
        names = [field.name for field in attrs.fields(cls)]
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                values[name] = float(value)
            except ValueError:
                values[name] = -1
            if name not in names or not 0 < values[name] < 86400:
                wanted = f"NAME=SECONDS,... with more than 0 seconds, and names of {', '.join(names)}"
                raise OptionInvalid(option="--x-cpr-limits", value=text, wanted=wanted)
        return cls(**values)
