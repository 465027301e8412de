"""The picture of docs/live-update.md: the stages of the pause by size of the guest, generated from the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STAGES: Final = {
    "stop": ("vCPUs out", "#4e79a7"),
    "quiesce": ("chardevs at rest", "#a0cbe8"),
    "save": ("state read", "#59a14f"),
    "send": ("state sent", "#8cd17d"),
    "load": ("state loaded", "#f28e2b"),
    "answer": ("destination's answer back", "#ffbe7d"),
    "resume": ("owner changed, guest entered", "#e15759"),
}
"""Stage -> what it is called, and its colour."""

QEMU: Final = {"128 MiB": 6.3, "1 GiB": 6.3, "4 GiB": 8.9}
"""QEMU 11.0.92, cpr-transfer, one vCPU: STOP to RESUME in ms, measured once on a machine of this kind.

Not of the run that the results are from: the QEMU there has no cpr-transfer.
"""

_WIDTH: Final = 820
_LEFT: Final = 190
_RIGHT: Final = 60
_ROW: Final = 26
_BAR: Final = 18
_GREY: Final = "#bab0ac"
_BOTTOM: Final = 96


def pause_chart(results: Mapping[str, Any]) -> str:
    """Return the picture as SVG."""
    pause, machine = results["pause"], results["machine"]
    sizes = pause["ours"]["unpinned"]
    bars = [(f"trio-vmm, {size}", _stages(found), found["total"]["median"]) for size, found in sizes.items()]
    floor = pause["floor"]["unpinned"]
    bars.append(("the floor, in bare C", _stages(floor), floor["total"]["median"]))
    bars += [(f"QEMU 11.0.92, {size} *", [("QEMU", _GREY, value)], value) for size, value in QEMU.items()]
    scale = (_WIDTH - _LEFT - _RIGHT) / (int(max(total for _, _, total in bars)) + 1)
    top, height = 40, 40 + len(bars) * _ROW + _BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" role="img">',
        "<title>The pause of a live update by stage, in milliseconds</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(12, 22, "The pause of a live update by stage: medians in ms, one vCPU", size=14),
    ]
    for number, (name, stages, total) in enumerate(bars):
        lines += _bar(top + number * _ROW, name, stages, total, scale)
    lines += _legend(top + len(bars) * _ROW + 16)
    updates = len(next(iter(sizes.values()))["total"]["values"])
    lines += [
        _text(12, height - 24, f"{updates} updates each, {machine['date']}, {machine['cpu']}, {machine['kvm']}."),
        _text(
            12, height - 8, "* Not of this run: cpr-transfer, STOP to RESUME, measured once on a machine of this kind."
        ),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _stages(found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    return [(name, colour, found[stage]["median"]) for stage, (name, colour) in STAGES.items() if stage in found]


def _bar(y: int, name: str, stages: list[tuple[str, str, float]], total: float, scale: float) -> Iterator[str]:
    yield _text(_LEFT - 8, y + 13, name, anchor="end")
    x = float(_LEFT)
    for stage, colour, value in stages:
        width = value * scale
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
            f"<title>{escape(stage)}: {value:.2f} ms</title></rect>"
        )
        x += width
    yield _text(round(_LEFT + max(total * scale, x - _LEFT)) + 6, y + 13, f"{total:.2f}")


def _legend(y: int) -> Iterator[str]:
    for number, (name, colour) in enumerate(STAGES.values()):
        x, row = 12 + number % 4 * 200, number // 4
        yield f'<rect x="{x}" y="{y + row * 18}" width="12" height="12" fill="{colour}"/>'
        yield _text(x + 18, y + row * 18 + 10, name)


def _text(x: int, y: int, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#222222">{escape(text)}</text>'
