#!/usr/bin/env python3
"""Records what state classes declare, and sections of theirs, in tests/golden: for a class or a version that is new.

    .venv/bin/python scripts/golden_state.py

A version that is recorded and in no release is written anew. One that a release has written is never touched: a class
that would need it has to get another version, and the script says so, writes nothing, and exits with status 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conformance.fingerprints import RECORD, recorded, updated
from tests.conformance.test_golden_state import FOLDER, files
from vmm.phases.section_kinds import section_kinds


def main() -> int:
    """The command line."""
    record, written, refused = updated(section_kinds(), recorded())
    for complaint in refused:
        print(complaint, file=sys.stderr)
    if refused:
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        path = FOLDER / f"{name}.json"
        if name in written or not path.exists():
            path.write_text(json.dumps(content, indent=2) + "\n")
            print(f"golden_state: {path.name}")
    if written:
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(f"golden_state: {RECORD.name}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
