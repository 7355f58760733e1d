"""Tree drafters: the draft model proposes a tree, a layer or a node at a time, over its own paged KV.

The nodes that were read lie one behind the other in the row's own blocks, behind its tokens; each
attends the row and its ancestors. Once the target has judged, the KV of the accepted way is moved to
where a chain's would be, and what else there was is written over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.kv.pool import moves
from engine.models.runner import Branches, Chunk
from engine.sampling import Place, plain, scaled_logits
from engine.sequence import Sequence
from engine.speculation.drafters.base import Drafted, Drafts, RowDraft
from engine.speculation.drafters.model import ModelDrafter
from engine.speculation.faults import fatal
from engine.speculation.features import signals
from engine.speculation.noise import coupled_key, first
from engine.speculation.tree import MOST_CHILDREN, Followers, Growth, Rule, TreeOptions
from engine.speculation.tree_table import TreeTable

if TYPE_CHECKING:
    from engine.speculation.pass_lane import LaneRow

_COOL = 0.6  # the temperature of greedy rows' trees: of a greedy law only a chain would come


class TreeDrafter:
    """Trees by `rule` over the draft model of `chains`. `longest`: the most tokens a row may have."""

    def __init__(self, rule: Rule, chains: ModelDrafter, longest: int) -> None:
        self.rule, self._chains, self._longest = rule, chains, longest

    def room(self, seq: Sequence) -> int:
        return self._chains.room(seq)

    def lags(self, seq: Sequence) -> bool:
        return self._chains.lags(seq)

    def read(self, rows: Seq[tuple[Sequence, int]], budget: int) -> None:
        self._chains.read(rows, budget)

    def warm(self, table: Any, policy: str, rows: int) -> None:
        return None  # what trees need is captured when they come

    def begin(self, rows: Seq[Sequence], limits: Seq[int], table: TreeTable) -> Drafts:
        drafted = self.draft(rows, limits, table)
        return lambda: drafted

    def draft(self, rows: Seq[Sequence], limits: Seq[int], table: TreeTable) -> Drafted:
        """A tree for each row, of at most limits[i] nodes. A fault ends it; what was drawn before stays."""
        trees = [
            _Tree(row, self.rule.start(row.options, most, self._deepest(row)))
            for row, most in zip(rows, limits, strict=True)
        ]
        growths = [(tree.row, tree.growth) for tree in trees]
        table.begin(growths)
        drafted = Drafted([])
        try:
            while asked := [tree for tree in trees if tree.ask()]:
                begin, first_pass = time.perf_counter(), asked[0].nodes == [-1]
                self._answer(asked)
                if not first_pass:  # the first one reads what the draft lacks, too
                    tokens = sum(len(tree.nodes) for tree in asked)
                    drafted.steps.append((tokens, time.perf_counter() - begin))
        except Exception as error:
            if fatal(error):
                raise
            drafted.fault = error
            for tree in trees:
                tree.forget()
        table.grown(growths)
        drafted.rows = [tree.told() for tree in trees]
        return drafted

    def settle(self, row: Sequence, draft: RowDraft, path: Seq[int]) -> None:
        """Keeps the draft's KV of the accepted way; before the row gets its tokens."""
        known = [draft.read[k] for k in path if draft.read[k] >= 0]  # parents are read before their children
        base = row.draft_kv_len
        if pairs := moves(row.blocks, base, known, self._chains.block_size):
            self._chains.runner.move(pairs)
        row.draft_kv_len = base + len(known)

    def _deepest(self, row: Sequence) -> int:
        room = min(
            row.params.max_tokens - row.generated - 1,
            self._longest - len(row.tokens) - 1,
            self.room(row),
            row.max_sl,
        )
        options = row.options
        assert isinstance(options, TreeOptions)
        return min(options.max_depth, room)

    def _answer(self, trees: list[_Tree]) -> None:
        """One pass of the draft over the nodes that are asked about; their followers."""
        again = getattr(self._chains.runner, "decodes", 0)
        chunks = [tree.chunk(again) for tree in trees]
        found = self._on_device(trees, chunks)
        if found is None:
            logits = self._chains.forward(chunks)
            owners = [tree for tree in trees for _ in tree.nodes]
            found = self._followers(logits, owners, [node for tree in trees for node in tree.nodes])
        at = 0
        for tree in trees:
            tree.hear(found[at : at + len(tree.nodes)])
            at += len(tree.nodes)

    def _on_device(self, trees: list[_Tree], chunks: list[Chunk]) -> list[Followers] | None:
        """By a few kernels, or one replay of a graph, if only temperatures count."""
        lane = self._chains.tree_lane()
        easy = not self.rule.reads and all(tree.row.coupled and plain(tree.row) for tree in trees)
        if lane is None or not easy:
            return None
        noisy = any(tree.row.params.temperature > 0 for tree in trees)
        at_once = lane.takes(chunks)
        rows = [tree.lane_row(chunk, at_once) for tree, chunk in zip(trees, chunks, strict=True)]
        told = (
            lane.followers(rows, noisy) if at_once else lane.behind(self._chains.forward(chunks), rows, noisy)
        )
        found, at = [], 0
        for tree, row in zip(trees, rows, strict=True):
            at += len(row.noise)
            mine = told[at - len(tree.nodes) : at]
            tree.unsound = tree.unsound or not all(mine)  # a law without masks is none if it is NaN
            found += [Followers(iter(each)) for each in mine]
        return found

    def _followers(self, logits: Tensor, owners: list[_Tree], nodes: list[int]) -> list[Followers]:
        """Of each place: the tokens in their order. Keeps the law where followers are drawn from it."""
        rows = [tree.row for tree in owners]
        ways = [tree.way(node) for tree, node in zip(owners, nodes, strict=True)]
        places = [Place(row, way) for row, way in zip(rows, ways, strict=True)]
        scaled = scaled_logits(
            logits, places, self._chains.eos_ids, drafting=True, heat=[tree.heat for tree in owners]
        )
        noisy = [i for i, row in enumerate(rows) if row.coupled and row.params.temperature > 0]
        if noisy:  # the target's choice is made under this noise: the law is what it leaves likely
            scaled = scaled.to(torch.float64)
            positions = [len(rows[i].tokens) + len(ways[i]) for i in noisy]
            scaled[noisy] += self._chains.noise([rows[i].seed for i in noisy], positions)
        drawn = [i for i, row in enumerate(rows) if self.rule.draws and not row.coupled]
        chosen = [i for i, row in enumerate(rows) if not self.rule.draws or row.coupled]
        orders: dict[int, Iterator[tuple[int, float]]] = {}
        squares: dict[int, float] = {}
        if drawn:
            laws = scaled[drawn].softmax(-1)
            found = self._chains.random.ordered(laws, [rows[i] for i in drawn], MOST_CHILDREN)
            orders.update(zip(drawn, found, strict=True))
            squares.update(zip(drawn, laws.square().sum(-1).tolist(), strict=True))
            for i, law in zip(drawn, laws, strict=True):
                owners[i].laws[nodes[i]] = law
        lists: list[list[tuple[int, float]]] = []
        if chosen:
            scores = scaled if len(chosen) == len(scaled) else scaled[chosen]
            lists = first(scores, MOST_CHILDREN)
            orders.update((i, iter(each)) for i, each in zip(chosen, lists, strict=True))
        empty = [i for i, each in zip(chosen, lists, strict=True) if not each]
        empty += [i for i, each in squares.items() if math.isnan(each)]
        if empty:  # no law: a head that knows nothing which is allowed, or NaN
            for i, nan in zip(empty, logits[empty].isnan().any(-1).tolist(), strict=True):
                owners[i].unsound = owners[i].unsound or nan
        read = signals(logits, logits.argmax(-1), {"entropy", "top"}) if self.rule.reads else {}
        shown = {name: values.tolist() for name, values in read.items()}
        return [
            Followers(orders[i], squares.get(i), **{name: values[i] for name, values in shown.items()})
            for i in range(len(rows))
        ]


class _Tree:
    """A row's tree while it is drafted. `nodes`: those that are asked about now."""

    def __init__(self, row: Sequence, growth: Growth) -> None:
        self.row, self.growth = row, growth
        growth.begin = row.generated
        options = row.options
        assert isinstance(options, TreeOptions)
        self.heat = options.draft_temperature or row.params.temperature or _COOL
        self.nodes: list[int] = []
        self.laws: dict[int, Tensor] = {}
        self.unsound = self.failed = False
        self._before = row.draft_kv_len
        self._read: dict[int, int] = {}  # by node, its place among those read
        self._seen: dict[int, int] = {-1: 0}  # by node, bits of the places of its ancestors and itself

    def ask(self) -> bool:
        self.nodes = self.growth.wants()
        return bool(self.nodes)

    def chunk(self, again: int) -> Chunk:
        """What the draft reads. A few nodes are read `again` with the new ones: the kernel for short passes
        sees branches only among the tokens of one pass.
        """
        row, growth = self.row, self.growth
        if self.nodes == [-1]:
            tokens, start = row.tokens[row.draft_kv_len :], row.draft_kv_len
            row.draft_kv_len = len(row.tokens)
            return Chunk(tokens, start, row.blocks)
        for node in self.nodes:
            at = self._read[node] = len(self._read)
            self._seen[node] = self._seen[growth.parents[node]] | 1 << at
        base = row.draft_kv_len
        nodes = list(self._read) if len(self._read) <= again else self.nodes
        return Chunk(
            [growth.tokens[node] for node in nodes],
            base + len(self._read) - len(nodes),
            row.blocks,
            len(self.nodes),
            Branches(
                trunk=base,
                positions=[base + growth.depths[node] - 1 for node in nodes],
                sees=[base] * len(nodes),
                masks=[self._seen[node] for node in nodes],
            ),
        )

    def lane_row(self, chunk: Chunk, whole: bool) -> LaneRow:
        """For all of the chunk's tokens, or without `whole` those whose followers are asked for."""
        from engine.speculation.pass_lane import LaneRow  # imports triton

        row, noise = self.row, [0] * (len(chunk.tokens) if whole else len(self.nodes))
        noisy = row.params.temperature > 0
        if noisy:
            for i, node in enumerate(self.nodes, len(noise) - len(self.nodes)):
                noise[i] = coupled_key(row.seed, len(row.tokens) + self.growth.depth(node))
        return LaneRow(row, chunk.start, chunk.tokens, chunk.branches, int(noisy), noise, self.heat)

    def hear(self, found: list[Followers]) -> None:
        self.growth.grow(dict(zip(self.nodes, found, strict=True)))

    def way(self, node: int) -> list[int]:
        """The tokens that lead to the node and its own."""
        found = []
        while node >= 0:
            found.append(self.growth.tokens[node])
            node = self.growth.parents[node]
        return found[::-1]

    def forget(self) -> None:
        """After a fault nobody knows what the draft has read."""
        self.failed = True
        self._read = {}
        self.row.draft_kv_len = self._before

    def told(self) -> RowDraft:
        """Depth first, siblings as they were taken."""
        growth = self.growth
        below: dict[int, list[int]] = {}
        for node in growth.kept():
            below.setdefault(growth.parents[node], []).append(node)
        order: list[int] = []
        left = below.get(-1, [])[::-1]
        while left:
            order.append(left.pop())
            left.extend(below.get(order[-1], [])[::-1])
        places = {-1: -1} | {node: k for k, node in enumerate(order)}
        draft = RowDraft(
            [growth.tokens[node] for node in order],
            [self.laws[growth.parents[node]] for node in order] if self.laws else [],
            parents=[places[growth.parents[node]] for node in order],
            read=[self._read.get(node, -1) for node in order],
            joint=[growth.products[node] for node in order] if growth.products else [],
            unsound=self.unsound,
        )
        if draft.parents == list(range(-1, len(order) - 1)) and all(
            at in (k, -1) for k, at in enumerate(draft.read)
        ):
            draft.parents = None  # a chain, whose KV lies where it belongs
            self.row.draft_kv_len += len([at for at in draft.read if at >= 0])
        draft.stop_reason = self._reason(len(order))
        return draft

    def _reason(self, nodes: int) -> str | None:
        """Why the tree has no more; None where that is what bounded its nodes from the start."""
        growth, options = self.growth, self.growth.options
        if self.unsound or self.failed:
            return "drafter"
        if nodes >= growth.most:
            return "cap" if growth.most == options.budget else None
        if max(growth.depths, default=0) < growth.deepest:
            return "policy"
        return "cap" if growth.deepest in (options.max_depth, self.row.max_sl) else "room"
