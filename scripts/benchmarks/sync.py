"""What serialization costs: `scripts/bench sync [OPTIONS]`, which is `heapd bench sync` with its raw figures kept."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from heapd.cli import main
from scripts.benchmarks._harness import RESULTS

if __name__ == "__main__":
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"sync-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    sys.argv[1:1] = ["bench", "sync"]  # as which the figures name the command
    main([*sys.argv[1:], "--save", str(path)])
