"""Run every check of tests/win32/facts: `python -m tests.win32.everything ENDPOINT`. Exit status 1 if one fails."""

from __future__ import annotations

import sys
import traceback

from heapd_client import win32
from tests.win32.facts import all_facts


def main(endpoint: str) -> int:
    failed = 0
    for fact in all_facts():
        win32.attach(endpoint)  # anew: with a process heap as fresh as a program's
        try:
            fact.check()
        except Exception:
            failed += 1
            print(f"{fact.name} ({', '.join(fact.ids)}):\n{traceback.format_exc()}", flush=True)
    win32.detach()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
