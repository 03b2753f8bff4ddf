"""Blocks that the daemon granted and that nobody will ever get: they are freed before the session's next call.

A signal handler may raise after a block was granted and before its caller knows of it, and an answer may come after its
call was given up. Nobody but the session can free such a block, and it cannot do so at once: that would be a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from heapd.errors import HeapdError
from heapd.wire import Request
from heapd.wire import messages as ask

__all__ = ["Strays"]


class Strays(deque[tuple[int, int, int]]):
    """Those of one session: each as its heap's id, address and generation; negative if it is only leased.

    A deque, because to add one, or to see whether there are any, must not need a call; see frontend.Freeing.
    """

    __slots__ = ()

    def take_late(self, request: Request, result: Any) -> None:
        """Add what was granted to a request whose answer came after it was given up."""
        if isinstance(request, ask.HeapAlloc):
            self.append((request.heap, result[1], result[2]))
        elif isinstance(request, ask.HeapAllocMany):
            self.extend((request.heap, grant[1], grant[2]) for grant in result)
        elif isinstance(request, ask.HeapLease):
            self.extend((request.heap, grant[1], -grant[2]) for grant in result)

    def give_back(self, call: Callable[[Request], Any]) -> None:
        """Free all, as far as the daemon can be reached. Args: call (asks it)."""
        while self:
            try:
                stray = self[0]
                heap_id, address, generation = stray
                if generation < 0:
                    call(ask.HeapGiveBack(heap_id, [address, -generation]))
                else:
                    call(ask.HeapFree(heap_id, address, generation))
            except ConnectionError:
                return
            except HeapdError:
                pass  # freed already, or its heap is gone
            except (IndexError, ValueError):
                continue  # another thread was faster
            with suppress(ValueError):
                self.remove(stray)  # after: an interrupted call is made again
