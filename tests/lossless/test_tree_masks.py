"""Trees under grammars, allowed_token_ids, bad_words: every branch keeps to them; the law is the target's."""

from __future__ import annotations

import pytest
from lossless.branches import assert_same_law, output_law
from lossless.coupled import tree
from lossless.masked import Rules, masked_engine, masked_law
from lossless.test_masks import EOS, PAIR, PROMPT, RULES, _asked
from lossless.toys import run, tokens_of, twins

import engine.speculation.drafters.tree
import engine.speculation.verifier
from engine.constraints import STUCK
from engine.core import Engine
from engine.sampling import Place
from engine.speculation.drafters.base import RowDraft
from engine.speculation.noise import RandomSource
from engine.types import SpeculationParams

TREES = {
    "layers": tree("dyspec", budget=4, max_depth=3, threshold=0.05),
    "greedy": tree("dyspec", budget=4, max_depth=3, growth="greedy"),
    "opt_tree": tree("opt_tree", budget=4, max_depth=3, delta=0.0),
}
Tree = engine.speculation.drafters.tree._Tree


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no ambiguous grammar."""
    monkeypatch.setattr("engine.grammar.SLOWEST_SECONDS", 60.0)


def check_law(rules: Rules, speculation: SpeculationParams, **params: object) -> None:
    asked = _asked(rules, speculation, **{"max_tokens": 4, "sampling_method": "rejection", **params})
    width = 64

    def build(random: RandomSource) -> Engine:
        return masked_engine(PAIR, EOS, random=random, rows=width, blocks=width * 8)

    expected = masked_law(PAIR.target, PROMPT, asked.params, rules)
    assert_same_law(output_law(build, [asked], width), {(output,): p for output, p in expected.items()})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", TREES)
def test_the_law_of_unseeded_sampling(name: str, kind: str) -> None:
    check_law(RULES[name], TREES[kind], max_tokens=3 if name == "any" else 4)


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.6, "top_k": 2}, {"min_tokens": 3}, {"ignore_eos": True}, {"stop_token_ids": (2,)}],
    ids=str,
)
def test_the_law_with_other_parameters(kind: str, params: dict[str, object]) -> None:
    check_law(RULES["all"], TREES[kind], **params)


def permitted(rules: Rules, draft: RowDraft, output: tuple[int, ...], params: object) -> bool:
    """Whether each node may follow its way."""
    ways = draft.before()
    return all(
        way[-1] in rules.tokens((*output, *way[:-1]), params)  # type: ignore[arg-type]
        for way in ways[1:]
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("how", ["greedy", "coupled", "rejection"])
def test_every_node_may_follow_its_way(monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    rules, shipped, method = RULES[name], Tree.told, "coupled" if how == "coupled" else "rejection"
    asked = [
        _asked(
            *(rules, TREES[kind], f"{kind} {seed}"),
            **{
                "max_tokens": 8,
                "seed": seed,
                "sampling_method": method,
                "temperature": float(how != "greedy"),
            },
        )
        for kind in TREES
        for seed in range(12)
    ]
    seen: list[RowDraft] = []

    def told(self: Tree) -> RowDraft:
        draft = shipped(self)
        output = tuple(self.row.tokens[self.row.prompt_len :])
        assert permitted(rules, draft, output, asked[0].params)
        seen.append(draft)
        return draft

    monkeypatch.setattr(Tree, "told", told)
    run(masked_engine(PAIR, EOS, rows=40), asked)
    assert any(draft.parents for draft in seen) or name in ("ends by itself", "empty or not")


@pytest.mark.parametrize("kind", TREES)
def test_a_grammars_end_ends_the_tree_and_the_output(kind: str) -> None:
    rules = Rules(4, EOS, "abcab")
    asked = _asked(rules, TREES[kind], temperature=0.0, max_tokens=20)
    own = run(masked_engine(twins(4), EOS), [asked])["r"]
    assert tokens_of(own) == (0, 1, 2, 0, 1)
    assert own[-1].finish_reason == "stop" and own[-1].stop_token_id is None
    # The first token is prefill's. One token may come at each place: the tree is a chain, and stands.
    assert sum(event.drafted for event in own) == sum(event.accepted for event in own) == 3


@pytest.mark.parametrize("kind", TREES)
def test_a_request_whose_masks_leave_nothing_fails_by_name(kind: str) -> None:
    engine = masked_engine(PAIR, EOS)
    engine.add(_asked(Rules(4, EOS, "abc", bad=((1, 2),)), TREES[kind], seed=1, max_tokens=9))
    events = []
    while engine.has_work():
        events += engine.step()[0]
    assert tokens_of(events) == (0, 1)
    assert [e.finish_reason for e in events if e.finish_reason] == ["error"]
    assert events[-1].error == STUCK
    assert engine._blocks.used_blocks == 0


def test_masks_of_another_branch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier asks of every node what may follow the depth-first row before it, not its own way."""

    def before(self: RowDraft) -> list[list[int]]:
        return [self.tokens[:k] for k in range(len(self.tokens) + 1)]

    monkeypatch.setattr(RowDraft, "before", before)
    with pytest.raises((AssertionError, IndexError)):
        for kind in TREES:
            check_law(RULES["star"], TREES[kind])


def test_masks_of_the_draft_alone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.speculation.verifier, "Place", lambda seq, drafted: Place(seq, []))
    with pytest.raises((AssertionError, IndexError)):
        for kind in TREES:
            check_law(RULES["star"], TREES[kind])
