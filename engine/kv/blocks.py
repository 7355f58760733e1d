"""Which block of the KV pools belongs to which sequence, and which hold a prefix worth keeping.

A *block* is `block_size` token positions in the target's pool and, under the same id, in the
draft's. A block is in one of three states:

- *fresh*: free, and its content means nothing;
- *referenced*: in at least one `BlockTable`;
- *cached*: referenced by nobody, but hashed: a later prompt that begins alike takes it back. Cached
  blocks are free for the taking too, the least recently used first.

Only full blocks whose tokens are final are hashed, only hashed blocks are shared, and a sequence
writes only behind its committed tokens: no block is shared while it is writable, so copy on write
does not arise. The one write into shared blocks is the draft half's catch-up; every writer puts
the same keys and values there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

# Blocks left free behind a new run for its sequence to grow into, while the pool has room.
_HEADROOM = 16


@dataclass
class BlockTable:
    """The blocks of one sequence, in the order of its tokens. Made by `BlockManager.match`.

    `committed`: leading tokens whose target KV is final; full blocks of them are hashed.
    `draft_tokens`: leading tokens whose draft KV is final. `salt`: sequences of different salts
    share nothing.
    """

    blocks: list[int] = field(default_factory=list)
    committed: int = 0
    draft_tokens: int = 0
    salt: str = ""
    key: bytes = field(default=b"", repr=False)  # of the last full committed block, or the salt's root


class BlockManager:
    """Hands out the `num_blocks` blocks of `block_size` tokens; remembers prefixes if `prefix_cache`.

    `queries` and `hits` count the tokens looked up and found by `match`, since the start.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_size {block_size} must be at least 1")
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.queries = self.hits = 0
        self._fresh = bytearray(b"\1" * num_blocks)  # 1: fresh. Bytes, so that runs are found by `find`
        self._num_fresh = num_blocks
        self._hint = 0  # where the search for a new run starts
        self._refs = [0] * num_blocks  # tables that hold the block
        self._drafted = bytearray(num_blocks)  # 1: the draft half is filled, for the whole block
        self._keys: list[bytes | None] = [None] * num_blocks  # None: not hashed
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted first
        self._epoch = 0  # of the cache; a reset starts another

    @property
    def free_blocks(self) -> int:
        """Blocks that `extend` can still hand out: fresh and cached ones."""
        return self._num_fresh + len(self._cached)

    @property
    def used_blocks(self) -> int:
        """Blocks referenced by at least one table."""
        return self.num_blocks - self.free_blocks

    def match(self, tokens: Sequence[int], salt: str, limit: int) -> BlockTable:
        """A table of the longest cached run of whole blocks that `tokens[:limit]` begins with.

        The table holds references: give it back by `release`. A caller that must compute the
        last token's logits passes `limit = len(tokens) - 1`.
        """
        table = BlockTable(salt=salt)
        if not self.prefix_cache:
            return table
        limit, size = min(limit, len(tokens)), self.block_size
        key = self._root(salt)
        for start in range(0, limit - size + 1, size):
            key = _chain(key, tokens[start : start + size])
            block = self._by_key.get(key)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
            table.blocks.append(block)
            table.key = key
        table.committed = len(table.blocks) * size
        for block in table.blocks:
            if not self._drafted[block]:
                break
            table.draft_tokens += size
        self.queries += max(limit, 0)
        self.hits += table.committed
        return table

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Gives the table room for `num_tokens` tokens in all; False, and nothing changed, if it cannot.

        Takes fresh blocks first, the physically next one where it is fresh, and evicts cached
        prefixes only for what is then missing.
        """
        need = -(-num_tokens // self.block_size) - len(table.blocks)
        if need <= 0:
            return True
        if need > self.free_blocks:
            return False
        if not table.blocks and self.prefix_cache:
            table.key = self._root(table.salt)
        fresh = min(need, self._num_fresh)
        new = self._take_fresh(fresh, table.blocks[-1] + 1 if table.blocks else self.num_blocks)
        # A released sequence is evicted from its end: sorted, its blocks are a run again.
        new += sorted(self._evict() for _ in range(need - fresh))
        for block in new:
            self._refs[block] = 1
            self._drafted[block] = 0
        table.blocks += new
        return True

    def commit(self, table: BlockTable, tokens: Sequence[int], num_tokens: int) -> None:
        """The sequence's tokens `tokens[:num_tokens]` are final, and so is their target KV.

        Hashes the blocks that this fills. One that equals a cached block (two prompts computed at
        the same time) stays private. Raises ValueError if `num_tokens` shrinks or exceeds the
        table's room or the tokens given.
        """
        size = self.block_size
        if not table.committed <= num_tokens <= min(len(tokens), len(table.blocks) * size):
            raise ValueError(
                f"cannot commit {num_tokens} tokens: {table.committed} are committed, "
                f"{len(tokens)} given, room for {len(table.blocks) * size}"
            )
        if self.prefix_cache:
            for index in range(table.committed // size, num_tokens // size):
                table.key = _chain(table.key, tokens[index * size : (index + 1) * size])
                if table.key not in self._by_key:
                    block = table.blocks[index]
                    self._by_key[table.key] = block
                    self._keys[block] = table.key
        table.committed = num_tokens

    def commit_draft(self, table: BlockTable, num_tokens: int) -> None:
        """The first `num_tokens` tokens are final and their draft KV is in the pool.

        Marks the full blocks, shared ones too. Raises ValueError if `num_tokens` shrinks or
        exceeds the table's room.
        """
        size = self.block_size
        if not table.draft_tokens <= num_tokens <= len(table.blocks) * size:
            raise ValueError(
                f"cannot commit the draft KV of {num_tokens} tokens: {table.draft_tokens} are committed, "
                f"room for {len(table.blocks) * size}"
            )
        for index in range(table.draft_tokens // size, num_tokens // size):
            self._drafted[table.blocks[index]] = 1
        table.draft_tokens = num_tokens

    def release(self, table: BlockTable) -> None:
        """Drops the table's references and empties it; hashed blocks stay cached. Idempotent."""
        # Backwards, so that a sequence's later blocks are evicted before the earlier ones they need.
        for block in reversed(table.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._give_fresh(block)
                else:
                    self._cached[block] = None
        table.blocks.clear()
        table.committed = table.draft_tokens = 0
        table.key = b""

    def reset_cache(self) -> None:
        """Forgets every cached prefix. Sequences at work keep their blocks but share them no more."""
        for block in self._by_key.values():
            self._keys[block] = None
        self._by_key.clear()
        for block in self._cached:
            self._give_fresh(block)
        self._cached.clear()
        # Keys chained from the old root: later blocks of those sequences match no new prompt.
        self._epoch += 1

    def _root(self, salt: str) -> bytes:
        """The parent key of a first block. `person` keeps any salt apart from every block's key."""
        text = f"{self._epoch}:{salt}".encode("utf-8", "surrogatepass")
        return blake2b(text, digest_size=16, person=b"kv root").digest()

    def _take_fresh(self, count: int, at: int) -> list[int]:
        """`count` fresh blocks, in runs as long as may be, beginning with block `at` if it is fresh."""
        fresh, taken, whole = self._fresh, list[int](), True
        while len(taken) < count:
            if at >= self.num_blocks or not fresh[at]:
                missing = count - len(taken)
                if whole:  # one search for a run that holds them all; after that piece by piece
                    at = fresh.find(b"\1" * missing, self._hint)
                    at = fresh.find(b"\1" * missing) if at < 0 else at
                    whole = at >= 0
                if not whole:
                    at = fresh.find(1)
                self._hint = (at + missing + _HEADROOM) % self.num_blocks
            fresh[at] = 0
            taken.append(at)
            at += 1
        self._num_fresh -= count
        return taken

    def _give_fresh(self, block: int) -> None:
        self._fresh[block] = 1
        self._num_fresh += 1

    def _evict(self) -> int:
        """Takes the least recently used cached block out of the cache."""
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None  # cached blocks are hashed
        del self._by_key[key]
        self._keys[block] = None
        return block


def _chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of the block of `tokens` behind the block of key `parent`: collisions cannot be made.

    Parent and tokens have fixed lengths, so that no two chains spell the same bytes.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
