"""The block manager, case by case and against a naive model that keeps every token it was given."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kv.blocks import BlockManager, BlockTable

SIZE = 4


def served(manager: BlockManager, tokens: list[int], salt: str = "", drafted: int = 0) -> BlockTable:
    """A table of which all tokens are committed, and `drafted` of them in the draft's half."""
    table = manager.match(tokens, salt, len(tokens))
    assert manager.extend(table, len(tokens))
    manager.commit(table, tokens, len(tokens))
    if drafted > table.draft_tokens:
        manager.commit_draft(table, drafted)
    return table


def test_a_committed_prefix_is_found_again_in_whole_blocks():
    manager = BlockManager(8, SIZE)
    tokens = list(range(10))
    first = served(manager, tokens)
    second = manager.match(tokens, "", len(tokens))
    assert second.blocks == first.blocks[:2]  # the third block is not full
    assert second.committed == 8
    assert (manager.queries, manager.hits) == (20, 8)


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (99, 8)])
def test_match_stays_within_its_limit(limit: int, found: int):
    manager = BlockManager(8, SIZE)
    tokens = list(range(8))
    served(manager, tokens)
    assert manager.match(tokens, "", limit).committed == found


def test_a_prefix_is_bound_to_everything_before_it():
    manager = BlockManager(8, SIZE)
    served(manager, [1, 1, 1, 1, 2, 2, 2, 2])
    assert manager.match([2, 2, 2, 2], "", 4).blocks == []
    assert manager.match([3, 3, 3, 3, 2, 2, 2, 2], "", 8).blocks == []


def test_salts_share_nothing():
    manager = BlockManager(8, SIZE)
    tokens = list(range(8))
    served(manager, tokens, "alice")
    assert manager.match(tokens, "", 8).blocks == []
    assert manager.match(tokens, "bob", 8).blocks == []
    assert manager.match(tokens, "alice", 8).committed == 8
    assert manager.match(tokens, "\ud800", 8).blocks == []  # any string is a salt


@pytest.mark.parametrize(("one", "other"), [(-1, -2), (0, 2**61 - 1)])
def test_ids_that_python_hashes_alike_are_kept_apart(one: int, other: int):
    assert hash(one) == hash(other)
    manager = BlockManager(8, SIZE)
    served(manager, [one] * 4)
    assert manager.match([other] * 4, "", 4).blocks == []


def test_extend_says_no_and_changes_nothing():
    manager = BlockManager(3, SIZE)
    table = manager.match([1], "", 0)
    assert manager.extend(table, 5)
    before = list(table.blocks)
    assert not manager.extend(table, 13)
    assert (table.blocks, manager.free_blocks, manager.used_blocks) == (before, 1, 2)
    assert manager.extend(table, 12)
    assert manager.extend(table, 3)  # room for less is there already
    assert len(table.blocks) == 3


def test_tables_are_contiguous_while_sequences_grow_side_by_side():
    manager = BlockManager(64, SIZE)
    tables = [manager.match([1], "", 0) for _ in range(3)]
    for length in range(1, 8 * SIZE):
        assert all(manager.extend(table, length) for table in tables)
    for table in tables:
        assert table.blocks == list(range(table.blocks[0], table.blocks[0] + 8))


def test_a_scattered_pool_still_gives_every_block():
    manager = BlockManager(40, SIZE)
    singles = [manager.match([1], "", 0) for _ in range(40)]
    assert all(manager.extend(table, 1) for table in singles)
    for table in singles[::2]:
        manager.release(table)
    table = manager.match([1], "", 0)
    assert manager.extend(table, 20 * SIZE)
    assert manager.free_blocks == 0
    held = {table.blocks[0] for table in singles[1::2]}
    assert held.isdisjoint(table.blocks) and len(set(table.blocks)) == 20


def test_the_cache_is_evicted_only_for_want_of_fresh_blocks_oldest_first_and_from_the_end():
    manager = BlockManager(6, SIZE)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        manager.release(served(manager, tokens))
    assert manager.free_blocks == 6
    other = manager.match([3], "", 0)
    assert manager.extend(other, 2 * SIZE)  # the two fresh ones
    for tokens in (old, new):
        table = manager.match(tokens, "", 8)
        assert table.committed == 8
        manager.release(table)
    assert manager.extend(other, 3 * SIZE)
    oldest = manager.match(old, "", 8)
    assert oldest.committed == 4  # its second block went, its first is still of use
    manager.release(oldest)  # used last now
    assert manager.extend(other, 5 * SIZE)
    assert manager.match(new, "", 8).committed == 0
    assert manager.match(old, "", 8).committed == 4


def test_a_shared_block_is_not_evicted_while_one_table_holds_it():
    manager = BlockManager(2, SIZE)
    first = served(manager, [1] * 4)
    second = manager.match([1] * 4, "", 4)
    manager.release(first)
    other = manager.match([2], "", 0)
    assert not manager.extend(other, 2 * SIZE)
    manager.release(second)
    assert manager.extend(other, 2 * SIZE)


def test_a_twin_stays_private_and_is_fresh_again_after_release():
    manager = BlockManager(4, SIZE)
    one, two = (manager.match([1] * 8, "", 8) for _ in range(2))
    assert manager.extend(one, 8) and manager.extend(two, 8)
    manager.commit(one, [1] * 8, 4)
    manager.commit(two, [1] * 8, 8)  # its first block is a twin, its second is the first of its kind
    found = manager.match([1] * 8, "", 8)
    assert found.blocks == [one.blocks[0], two.blocks[1]]
    for table in (one, two, found):
        manager.release(table)
    table = manager.match([1] * 8, "", 8)
    assert table.committed == 8
    assert manager.extend(table, 16)  # the twin's block and the never full one need no eviction
    assert manager.match([1] * 8, "", 8).committed == 8


def test_draft_halves_are_known_by_block():
    manager = BlockManager(8, SIZE)
    tokens = list(range(12))
    first = served(manager, tokens, drafted=7)
    second = manager.match(tokens, "", 12)
    assert (second.committed, second.draft_tokens) == (12, 4)
    manager.commit_draft(second, 12)  # catches up in shared blocks
    manager.release(first)
    manager.release(second)
    assert manager.match(tokens, "", 12).draft_tokens == 12


def test_only_the_leading_run_of_draft_halves_counts():
    manager = BlockManager(8, SIZE)
    tokens = list(range(8))
    twins = [manager.match(tokens, "", 8) for _ in range(2)]
    assert all(manager.extend(table, 8) for table in twins)
    manager.commit(twins[0], tokens, 4)  # its block 0 is cached, without a draft half
    manager.commit(twins[1], tokens, 8)
    manager.commit_draft(twins[1], 8)  # its block 1 is cached, with one
    assert manager.match(tokens, "", 8).draft_tokens == 0


def test_a_block_taken_anew_has_no_draft_half():
    manager = BlockManager(1, SIZE)
    manager.release(served(manager, [1] * 4, drafted=4))
    table = served(manager, [2] * 4)
    assert table.draft_tokens == 0
    assert manager.match([2] * 4, "", 4).draft_tokens == 0


def test_release_is_idempotent_and_leaves_an_empty_table():
    manager = BlockManager(4, SIZE)
    table = served(manager, [1] * 6, drafted=6)
    manager.release(table)
    manager.release(table)
    assert (table.blocks, table.committed, table.draft_tokens) == ([], 0, 0)
    assert (manager.free_blocks, manager.used_blocks) == (4, 0)


def test_reset_forgets_what_was_and_what_follows_from_it():
    manager = BlockManager(8, SIZE)
    tokens = list(range(12))
    manager.release(served(manager, [9] * 4))
    table = manager.match(tokens, "", 12)
    assert manager.extend(table, 12)
    manager.commit(table, tokens, 8)
    manager.reset_cache()
    assert manager.match([9] * 4, "", 4).blocks == []
    assert manager.match(tokens, "", 12).blocks == []
    manager.commit(table, tokens, 12)  # its third block follows from forgotten ones
    fresh = manager.match(tokens, "", 12)
    assert manager.extend(fresh, 12)
    manager.commit(fresh, tokens, 8)
    assert manager.match(tokens, "", 12).blocks == fresh.blocks[:2]
    manager.release(table)
    manager.release(fresh)
    assert manager.free_blocks == 8 - 2  # the match above holds two
    other = manager.match([5], "", 0)
    assert manager.extend(other, 6 * SIZE)  # whatever was hashed once, all of it can be had


def test_without_a_prefix_cache_nothing_is_kept():
    manager = BlockManager(4, SIZE, prefix_cache=False)
    manager.release(served(manager, [1] * 8))
    assert manager.match([1] * 8, "", 8).blocks == []
    assert (manager.queries, manager.hits) == (0, 0)


def test_impossible_commits_are_refused():
    manager = BlockManager(4, SIZE)
    table = served(manager, [1] * 6, drafted=5)
    for tokens, count in (([1] * 6, 5), ([1] * 6, 7), ([1] * 99, 9)):
        with pytest.raises(ValueError, match="cannot commit"):
            manager.commit(table, tokens, count)
    for count in (4, 9):
        with pytest.raises(ValueError, match="cannot commit"):
            manager.commit_draft(table, count)
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(0, SIZE)


def test_a_thousand_random_requests_leak_no_block():
    dice = random.Random(7)
    manager = BlockManager(24, SIZE)
    running: list[tuple[BlockTable, list[int]]] = []
    for _ in range(1000):
        tokens = [dice.randrange(2) for _ in range(dice.randrange(1, 40))]
        table = manager.match(tokens, dice.choice(["", "a"]), len(tokens) - 1)
        while not manager.extend(table, len(tokens)):
            manager.release(running.pop(dice.randrange(len(running)))[0])
        done = dice.randrange(table.committed, len(tokens) + 1)  # less than all: it was cancelled
        manager.commit(table, tokens, done)
        running.append((table, tokens))
        if len(running) > 4:
            manager.release(running.pop(0)[0])
    for table, _ in running:
        manager.release(table)
    assert (manager.free_blocks, manager.used_blocks) == (24, 0)
    manager.reset_cache()
    whole = manager.match([0], "", 0)
    assert manager.extend(whole, 24 * SIZE)
    assert sorted(whole.blocks) == list(range(24))


BLOCKS = 9
Tokens = st.lists(st.integers(0, 1), min_size=1, max_size=5 * SIZE)


class Row:
    """A sequence of the model: its table, its tokens, and which tokens' draft KV it has written."""

    def __init__(self, table: BlockTable, tokens: list[int]) -> None:
        self.table, self.tokens = table, tokens


class Blocks(RuleBasedStateMachine):
    """Sequences come, grow, write, commit and go; the model keeps what each slot of the pools holds.

    A slot holds the whole (salt, prefix) its KV was computed from, so that wrong reuse shows.
    """

    @initialize(prefix_cache=st.sampled_from([True, True, True, False]))
    def begin(self, prefix_cache: bool) -> None:
        self.manager = BlockManager(BLOCKS, SIZE, prefix_cache)
        self.rows: list[Row] = []
        self.target: dict[int, object] = {}  # by slot
        self.draft: dict[int, object] = {}
        self.cache: dict[tuple[str, tuple[int, ...]], int] = {}  # block by salt and prefix
        self.drafted: dict[int, bool] = {}  # by block
        self.unused: list[int] = []  # cached and unreferenced, the next to be evicted first
        self.epoch = 0

    def content(self, row: Row, index: int) -> object:
        return (row.table.salt, tuple(row.tokens[: index + 1]))

    def slot(self, row: Row, index: int) -> int:
        return row.table.blocks[index // SIZE] * SIZE + index % SIZE

    def held(self) -> list[int]:
        return [block for row in self.rows for block in row.table.blocks]

    @rule(tokens=Tokens, salt=st.sampled_from(["", "s"]), keep=st.integers(0, 2))
    def arrive(self, tokens: list[int], salt: str, keep: int) -> None:
        limit = len(tokens) - keep
        table = self.manager.match(tokens, salt, limit)
        expected = []
        for end in range(SIZE, limit + 1, SIZE):
            if (salt, tuple(tokens[:end])) not in self.cache:
                break
            expected.append(self.cache[salt, tuple(tokens[:end])])
        assert table.blocks == expected
        assert table.committed == len(expected) * SIZE
        run = next((i for i, block in enumerate(expected) if not self.drafted[block]), len(expected))
        assert table.draft_tokens == run * SIZE
        self.unused = [block for block in self.unused if block not in expected]
        row = Row(table, tokens)
        for index in range(table.committed):
            assert self.target[self.slot(row, index)] == self.content(row, index)
        for index in range(table.draft_tokens):
            assert self.draft[self.slot(row, index)] == self.content(row, index)
        self.rows.append(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), more=st.integers(1, 3 * SIZE))
    def grow(self, data: st.DataObject, more: int) -> None:
        row = data.draw(st.sampled_from(self.rows))
        before = list(row.table.blocks)
        free = BLOCKS - len(set(self.held()))
        want = len(row.tokens) + more
        need = max(0, -(-want // SIZE) - len(before))
        fresh = free - len(self.unused)
        follows = before and before[-1] + 1 < BLOCKS and before[-1] + 1 not in {*self.held(), *self.unused}
        assert self.manager.extend(row.table, want) == (need <= free)
        if need > free:
            assert row.table.blocks == before
            return
        new = row.table.blocks[len(before) :]
        assert row.table.blocks[: len(before)] == before and len(new) == need
        if new and follows:
            assert new[0] == before[-1] + 1
        evicted, self.unused = (
            self.unused[: max(0, need - fresh)],
            self.unused[max(0, need - fresh) :],
        )
        assert set(new) & {*self.unused, *before} == set()
        assert set(evicted) <= set(new)
        self.cache = {key: block for key, block in self.cache.items() if block not in evicted}
        for block in new:
            self.drafted[block] = False
            for slot in range(block * SIZE, (block + 1) * SIZE):
                self.target[slot] = self.draft[slot] = "left over"
        # A step writes behind the committed tokens, also what is rejected afterwards.
        for index in range(row.table.committed, len(row.table.blocks) * SIZE):
            self.target[self.slot(row, index)] = "rejected"
        # So does the draft, but shared blocks get what belongs there (catch-up).
        for index in range(max(row.table.committed, row.table.draft_tokens), len(row.table.blocks) * SIZE):
            self.draft[self.slot(row, index)] = "rejected"

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), max_size=6), drafts=st.booleans())
    def compute(self, data: st.DataObject, new: list[int], drafts: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        row.tokens += new
        done = min(len(row.tokens), len(row.table.blocks) * SIZE)
        done = data.draw(st.integers(row.table.committed, done))
        for index in range(row.table.committed, done):
            self.target[self.slot(row, index)] = self.content(row, index)
        first = row.table.committed // SIZE
        self.manager.commit(row.table, row.tokens, done)
        assert row.table.committed == done
        for index in range(first, done // SIZE if self.manager.prefix_cache else 0):
            key = (row.table.salt, tuple(row.tokens[: (index + 1) * SIZE]))
            self.cache.setdefault(key, row.table.blocks[index])
        if drafts and done >= row.table.draft_tokens:
            for index in range(row.table.draft_tokens, done):
                self.draft[self.slot(row, index)] = self.content(row, index)
            for index in range(row.table.draft_tokens // SIZE, done // SIZE):
                self.drafted[row.table.blocks[index]] = True
            self.manager.commit_draft(row.table, done)
            assert row.table.draft_tokens == done

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), again=st.booleans())
    def leave(self, data: st.DataObject, again: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.rows.remove(row)
        blocks = list(row.table.blocks)
        self.manager.release(row.table)
        if again:
            self.manager.release(row.table)
        assert row.table.blocks == []
        self.unused += [
            block for block in reversed(blocks) if block in self.cache.values() and block not in self.held()
        ]

    @precondition(lambda self: not self.rows)  # with rows at work: a test of its own above
    @rule()
    def forget(self) -> None:
        self.manager.reset_cache()
        self.cache.clear()
        self.unused.clear()

    @invariant()
    def writable_blocks_have_one_owner(self) -> None:
        if hasattr(self, "rows"):
            writable = [
                block for row in self.rows for block in row.table.blocks[row.table.committed // SIZE :]
            ]
            assert all(self.held().count(block) == 1 for block in writable)
            assert set(writable).isdisjoint(self.cache.values())

    @invariant()
    def counts_are_exact(self) -> None:
        if hasattr(self, "rows"):
            held = self.held()
            assert self.manager._refs == [held.count(block) for block in range(BLOCKS)]
            assert self.manager.used_blocks == len(set(held))
            assert self.manager.free_blocks == BLOCKS - len(set(held))
            assert list(self.manager._cached) == self.unused

    @invariant()
    def cached_content_is_what_its_key_says(self) -> None:
        if hasattr(self, "rows"):
            for (salt, prefix), block in self.cache.items():
                start = len(prefix) - SIZE
                for offset in range(SIZE):
                    content = (salt, prefix[: start + offset + 1])
                    assert self.target[block * SIZE + offset] == content
                    if self.drafted[block]:
                        assert self.draft[block * SIZE + offset] == content

    def teardown(self) -> None:
        if hasattr(self, "rows"):
            for row in self.rows:
                self.manager.release(row.table)
            assert self.manager.free_blocks == BLOCKS


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
