"""The Win32 heap functions, by their own names and by their own rules, over the heaps of a daemon.

    from heapd_client import win32

    heap = win32.HeapCreate(0, 0, 0)
    address = win32.HeapAlloc(heap, win32.HEAP_ZERO_MEMORY, 100)
    win32.memory(address, 5)[:] = b"hello"
    win32.HeapFree(heap, 0, address)
    win32.HeapDestroy(heap)

Handles and addresses are ints, 0 is NULL; a failing function returns what the documentation of Windows says and sets
the calling thread's last error. docs/win32.md tells how each rule is kept, and where this departs from Windows.
"""

from . import constants, global_objects, heaps, information, local_objects, structures, toolhelp
from .access import memory, pointer
from .constants import *  # noqa: F403
from .global_objects import *  # noqa: F403
from .heaps import *  # noqa: F403
from .information import *  # noqa: F403
from .last_error import GetLastError, SetLastError, StructuredException
from .local_objects import *  # noqa: F403
from .process import attach, detach
from .structures import *  # noqa: F403
from .toolhelp import *  # noqa: F403
from .walk import HeapWalk

__all__ = ["GetLastError", "HeapWalk", "SetLastError", "StructuredException", "attach", "detach", "memory", "pointer"]
__all__ += constants.__all__
__all__ += global_objects.__all__
__all__ += heaps.__all__
__all__ += information.__all__
__all__ += local_objects.__all__
__all__ += structures.__all__
__all__ += toolhelp.__all__
