"""The mapping as pages: reserve, commit, decommit, release; which page is what; how much may be committed."""

from heapd.arena.arena import Arena
from heapd.arena.budget import SHM_ADVICE, Budget, Headroom, default_commit_limit, measure_headroom, shm_left
from heapd.arena.extents import Extents
from heapd.arena.restore import check_file, restore_arena
from heapd.arena.segment import SHM_DIRECTORY, Segment, remove_segment, segment_exists

__all__ = [
    "SHM_ADVICE",
    "SHM_DIRECTORY",
    "Arena",
    "Budget",
    "Extents",
    "Headroom",
    "Segment",
    "check_file",
    "default_commit_limit",
    "measure_headroom",
    "remove_segment",
    "restore_arena",
    "segment_exists",
    "shm_left",
]
