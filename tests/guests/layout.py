"""What the C compiler makes of the layout of guests' memory, and what Python does."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from vmm import guests

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCES = Path(guests.__file__).parent


def in_c(directory: Path, expressions: Sequence[str], structure: str, header: type[attrs.AttrsInstance]) -> list[int]:
    """Return the values of `expressions` in layout.h, and the offsets that `structure` has its members at.

    The members are those of `header`; a program that prints it all is made in `directory`.
    """
    numbers = [*expressions, *(f"__builtin_offsetof({structure}, {field.name})" for field in attrs.fields(header))]
    program = directory / "print.c"
    program.write_text(
        '#include <stdio.h>\n#include "layout.h"\nint main(void) {'
        + "".join(f'printf("%u\\n", (unsigned)({number}));' for number in numbers)
        + "return 0;}"
    )
    subprocess.run(["gcc", f"-I{SOURCES}", "-o", directory / "print", program], check=True)
    return [int(line) for line in subprocess.check_output([directory / "print"]).split()]


def offsets_of(layout: struct.Struct) -> list[int]:
    """Return where each member of `layout`, such as "<10I5Q", begins."""
    codes = [code for count, code in _codes(layout.format) for _ in range(count)]
    return [struct.calcsize("<" + "".join(codes[:n])) for n in range(len(codes))]


def _codes(layout: str) -> list[tuple[int, str]]:
    """Split "<10I5Q" into its counts and codes."""
    found, count = [], ""
    for letter in layout.removeprefix("<"):
        if letter.isdigit():
            count += letter
        else:
            found.append((int(count or 1), letter))
            count = ""
    return found
