"""Every error that heapd raises, for `except`: the tree is drawn in heapd.errors."""

from heapd.errors import *  # noqa: F403
from heapd.errors import __all__ as __all__
