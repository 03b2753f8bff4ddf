"""Operations on the blocks of a heap: allocate, resize, free, lend and take back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from heapd.errors import (
    DoubleFreeError,
    HeapDestroyedError,
    HeapFullError,
    InvalidArgumentError,
    NotABlockError,
    StaleHandleError,
)
from heapd.heap import SLICE_BYTES
from heapd.layout import MAX_BLOCK_SIZE
from heapd.manager.directory import Directory, Job, Unanswered
from heapd.manager.quota import Quotas
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap
from heapd.records import Grant
from heapd.sizeclass import extent_of
from heapd.units import PAGE_SHIFT
from heapd.wire import messages as m

__all__ = ["BlockOperations"]

_WORDS_A_SLICE = 5_000
_BLOCKS_A_SLICE = 512


class BlockOperations:
    """Each public method is one request's handler."""

    def __init__(self, directory: Directory, quotas: Quotas) -> None:
        self._directory = directory
        self._quotas = quotas

    def alloc(self, session: Session, request: m.HeapAlloc) -> Grant | Job:
        shared = session.heaps.get(request.heap) or self._directory.locate(session, request.heap)
        size = request.size
        if shared.quota or self._quotas.limit:
            shared.heap.check_size(size)
            extent = extent_of(size)
            if not self._quotas.admits(session, shared, extent):
                return self._quotas.when_recounted(session, shared, extent, lambda: self._alloc(session, shared, size))
        return self._alloc(session, shared, size)

    def _alloc(self, session: Session, shared: SharedHeap, size: int) -> Grant | Job:
        if size > SLICE_BYTES:
            return self._alloc_large(session, shared, size)
        try:
            return shared.heap.alloc(size, session.number)
        except HeapFullError as error:
            raise self._restated(error, size) from None

    def _alloc_large(self, session: Session, shared: SharedHeap, size: int) -> Job:
        try:
            grant = yield from shared.heap.alloc_in_slices(size, session.number)
        except HeapFullError as error:
            yield from self._directory.settle()
            raise self._restated(error, size) from None
        if not session.is_live and not shared.is_destroyed:
            # The session ended while its block was committed: nobody will ever hear of the block.
            shared.heap.free(grant.address, grant.generation)
            yield from self._directory.settle()
        return grant

    def alloc_many(self, session: Session, request: m.HeapAllocMany) -> list[Grant] | Job:
        shared = self._directory.locate(session, request.heap)
        sizes = request.sizes
        for size in sizes:
            shared.heap.check_size(size)
        if shared.quota or self._quotas.limit:
            extents = sum(map(extent_of, sizes))
            if not self._quotas.admits(session, shared, extents):
                return self._quotas.when_recounted(
                    session, shared, extents, lambda: self._alloc_many(session, shared, sizes)
                )
        return self._alloc_many(session, shared, sizes)

    def _alloc_many(self, session: Session, shared: SharedHeap, sizes: list[int]) -> list[Grant] | Job:
        if sum(sizes) > SLICE_BYTES // 4 or len(sizes) > _BLOCKS_A_SLICE:
            return self._alloc_many_large(session, shared, sizes)
        grants: list[Grant] = []
        try:
            for size in sizes:
                grants.append(shared.heap.alloc(size, session.number))
        except HeapFullError as error:
            self._undo(shared, grants)
            raise self._restated(error, sum(sizes)) from None
        return grants

    def _alloc_many_large(self, session: Session, shared: SharedHeap, sizes: list[int]) -> Job:
        unanswered = self._directory.expect(shared)
        grants = unanswered.grants
        try:
            yield from self._alloc_all(session, unanswered, sizes)
        except HeapFullError as error:
            self._undo(shared, grants)
            self._directory.resolve(unanswered)
            yield from self._directory.settle()
            raise self._restated(error, sum(sizes)) from None
        finally:
            self._directory.resolve(unanswered)
        if not session.is_live and not shared.is_destroyed:
            self._undo(shared, grants)
            yield from self._directory.settle()
        return grants

    def _alloc_all(self, session: Session, unanswered: Unanswered, sizes: list[int]) -> Job:
        """Allocate a block for each of the sizes, in slices. Raises: HeapFullError, HeapDestroyedError."""
        shared = unanswered.shared
        spent = 0
        for size in sizes:
            # A slice later another request of the session may have had what was admitted.
            self._quotas.check(session, shared, extent_of(size))
            if size > SLICE_BYTES:
                unanswered.add((yield from shared.heap.alloc_in_slices(size, session.number)))
            else:
                unanswered.add(shared.heap.alloc(size, session.number))
                spent += size + SLICE_BYTES // 4 // _BLOCKS_A_SLICE
                if spent > SLICE_BYTES // 4:
                    spent = 0
                    yield None
            if shared.is_destroyed:
                raise HeapDestroyedError("the heap was destroyed while the blocks were allocated")

    def _restated(self, error: HeapFullError, requested: int) -> HeapFullError:
        """The error of a step, as one of the whole request, whose earlier steps were undone."""
        if error.bound in ("commit", "memory"):
            return error.for_request(requested, self._directory.arena.budget.committed)
        return error.for_request(requested)

    def forget(self, unanswered: Unanswered) -> None:
        """Undo what an earlier process did for a request that it did not come to answer."""
        self._undo(unanswered.shared, unanswered.grants)
        self._directory.resolve(unanswered)

    @staticmethod
    def _undo(shared: SharedHeap, grants: list[Grant]) -> None:
        """Free what nobody was told of; some may be gone: reaped, or found by a walk and freed."""
        for grant in grants:
            with suppress(NotABlockError, DoubleFreeError, StaleHandleError):
                shared.heap.free(grant.address, grant.generation)

    def resize(self, session: Session, request: m.HeapResize) -> Grant | Job:
        shared = self._directory.locate(session, request.heap)
        run = shared.heap.runs.get(request.address >> PAGE_SHIFT)  # a slab block grows within its extent
        more = extent_of(request.size) - (run << PAGE_SHIFT) if run and request.size <= MAX_BLOCK_SIZE else 0
        if more > 0 and not self._quotas.admits(session, shared, more):
            return self._quotas.when_recounted(session, shared, more, lambda: self._resize(session, shared, request))
        return self._resize(session, shared, request)

    def _resize(self, session: Session, shared: SharedHeap, request: m.HeapResize) -> Grant | Job:
        heir = session.number if shared.frees_orphans else 0  # as of a block that the client moves
        try:
            grant = shared.heap.resize(
                request.address, request.generation, request.size, in_place_only=request.in_place_only, session=heir
            )
        except NotABlockError as error:
            raise self._directory.explain(shared, request.address, error) from None
        except HeapFullError as error:
            raise self._restated(error, request.size) from None
        return grant if self._directory.arena.is_settled else self._directory.settle_then(grant)

    def free(self, session: Session, request: m.HeapFree) -> Job | None:
        shared = session.heaps.get(request.heap) or self._directory.locate(session, request.heap)
        try:
            shared.heap.free(request.address, request.generation)
        except NotABlockError as error:
            raise self._directory.explain(shared, request.address, error) from None
        return None if self._directory.arena.is_settled else self._directory.settle_then(None)

    def free_many(self, session: Session, request: m.HeapFreeMany) -> Job | None:
        shared = self._directory.locate(session, request.heap)
        if len(request.blocks) % 2:
            raise InvalidArgumentError("blocks are pairs of address and generation; one is incomplete")
        pairs = list(zip(request.blocks[::2], request.blocks[1::2], strict=True))
        if len({address for address, _ in pairs}) != len(pairs):
            raise InvalidArgumentError("a block is named twice in one free_many; nothing was freed")
        doomed = []
        for address, generation in pairs:
            try:
                doomed.append(shared.heap.check_free(address, generation))
            except NotABlockError as error:
                raise self._directory.explain(shared, address, error) from None
        for block in doomed:  # whatever somebody may write into their words meanwhile: it is all or none
            shared.heap.take_back(*block)
        return None if self._directory.arena.is_settled else self._directory.settle_then(None)

    def lease(self, session: Session, request: m.HeapLease) -> list[Grant] | Job:
        shared = session.heaps.get(request.heap) or self._directory.locate(session, request.heap)
        if request.size * request.count + sum(request.others) > SLICE_BYTES:
            raise InvalidArgumentError(
                f"a lease of {request.count} blocks of {request.size} bytes and {len(request.others)} others is too"
                " large at once"
            )
        count = min(request.count, _BLOCKS_A_SLICE)
        others = request.others[: _BLOCKS_A_SLICE - count]
        if shared.quota or self._quotas.limit:
            return self._lend_within_quota(session, shared, request.size, count, others)
        return self._lend(session, shared, request.size, count, others)

    def _lend_within_quota(
        self, session: Session, shared: SharedHeap, size: int, count: int, others: Sequence[int]
    ) -> list[Grant] | Job:
        """As many as fit; a session that has room for none has its blocks counted anew, for one."""
        shared.heap.check_size(size)
        extent = extent_of(size)
        if not self._quotas.admits(session, shared, count * extent + sum(map(extent_of, others))):
            count, others = min(count, self._quotas.room(session, shared) // extent), []
            if not count or not self._quotas.admits(session, shared, count * extent):
                return self._quotas.when_recounted(
                    session, shared, extent, lambda: self._lend(session, shared, size, 1, [])
                )
        return self._lend(session, shared, size, count, others)

    def _lend(self, session: Session, shared: SharedHeap, size: int, count: int, others: Sequence[int]) -> list[Grant]:
        try:
            return shared.heap.lease(size, count, session.number, others)
        except HeapFullError as error:
            raise self._restated(error, size) from None

    def give_back(self, session: Session, request: m.HeapGiveBack) -> int | Job:
        shared = session.heaps.get(request.heap) or self._directory.locate(session, request.heap)
        if len(request.blocks) % 2:
            raise InvalidArgumentError("blocks are pairs of address and generation; one is incomplete")
        if request.sweep:
            return self._sweep(session, shared, request.sweep)
        give_back, is_live = shared.heap.give_back, self._directory.sessions.is_live
        pairs = zip(request.blocks[::2], request.blocks[1::2], strict=True)
        taken = sum(give_back(address, session.number, is_live, generation) for address, generation in pairs)
        return taken if self._directory.arena.is_settled else self._directory.settle_then(taken)

    def _sweep(self, session: Session, shared: SharedHeap, number: int) -> Job:
        """Take back all that the session caches, unless it does not wait for that any more: then it may cache anew."""
        if number < session.sweeps.get(shared.heap_id, 0):
            return 0
        session.sweeps[shared.heap_id] = number
        taken, is_live = 0, self._directory.sessions.is_live
        for seen, (_, address) in enumerate(shared.heap.lent_slots(), 1):
            taken += shared.heap.give_back(address, session.number, is_live)
            if seen % _WORDS_A_SLICE == 0:
                yield None
                if shared.is_destroyed or session.sweeps.get(shared.heap_id) != number:
                    return taken
        shared.heap.pool.drop_empty()
        yield from self._directory.settle()
        return taken
