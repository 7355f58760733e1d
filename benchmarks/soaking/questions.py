"""What the soak's clients ask: seeded requests whose answers are known, and everything else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from lossless.schemas import schema
from suites.accounts import Ask

Body = dict[str, Any]
Speculation = dict[str, Any] | None

WORDS = (
    "river", "the", "of", "a", "stone", "counts", "blue", "and", "seven", "machine", "under", "runs", "to",
    "light", "on", "paper", "0x1f", "def", "return", "naïve", "größe", "名前", "(x)", "because", "end.",
)  # fmt: skip
REGEXES = (
    "[A-Z]{2}-[0-9]{3}",
    "(yes|no|maybe), (because|since) [a-z ]{4,40}\\.",
    "[0-9]{1,3}(\\.[0-9]{1,3}){3}",
    "(ab|cd)*e",
    "#[0-9a-f]{6}( #[0-9a-f]{6}){0,3}",
)
_SCHEMAS = 24  # compiled, each is kept by server and engine up to their bounds: memory would grow up to those
ENDLESS = "[a-z ,]*"  # an answer that never ends by itself


@dataclass(frozen=True)
class Sizes:
    """Tokens of an answer at most, of one that is left; words of short and long prompts at most.

    `filling`: tokens of the prompts that fill the KV pool. `patience`: seconds until a whole answer is left,
    at most.
    """

    tokens: int = 48
    left: int = 1200
    words: int = 24
    long_words: int = 300
    filling: int = 1000
    patience: float = 3


@dataclass(frozen=True)
class Question:
    """A request. `known`: its place in the catalogue; `status`: that of its answer."""

    kind: str
    ask: Ask
    known: int | None = None
    status: int = 200
    pair: tuple[str, str] | None = None  # drafter and policy that it names


def pairs_of(page: dict[str, Any]) -> list[tuple[str, str]]:
    """Every drafter with every policy that may govern it, as GET /v1/policies says.

    "none" beside one that no policy governs: without a draft, and of trees.
    """
    ungoverned = {"none", *(tree["name"] for tree in page.get("trees", ()))}
    pairs = []
    for drafter in page["drafters"]:
        governed = [p["name"] for p in page["policies"] if drafter not in p["unavailable"]]
        pairs += [(drafter, policy) for policy in (["none"] if drafter in ungoverned else governed)]
    return pairs


class Questions:
    """Makes requests, all of them by one seed; pairs and the catalogue take turns."""

    def __init__(
        self, model: str, pairs: Sequence[tuple[str, str]], sizes: Sizes, catalogue: int, seed: int
    ) -> None:
        self._model, self._sizes = model, sizes
        self._source = random.Random(seed)
        self._pairs = cycle(pairs)
        self.catalogue = [self._seeded(place) for place in range(catalogue)]
        self._known = cycle(self.catalogue)
        self._deck: list[Callable[[], Question]] = []  # of the next ones

    def _seeded(self, place: int) -> Question:
        kind = list(KINDS)[place % len(KINDS)]
        ask = KINDS[kind](self._source, self._sizes)
        body = {"seed": self._source.randrange(2**40), "return_token_ids": True, **ask.body}
        body["speculation"] = {"drafter": "none"}
        return Question(kind, self._named(ask, body), known=place)

    def filling(self, tokens: int) -> list[Question]:
        """Prompts of so many tokens in all, no two alike, read by the target and by every drafter."""
        made = []
        while tokens > 0:
            size = min(tokens, self._sizes.filling)
            ids = [self._source.randrange(10, 250) for _ in range(size)]
            body = {"prompt": ids, "max_tokens": 2, "ignore_eos": True}
            body |= {"speculation": self._speculation(next(self._pairs))}
            made.append(Question("filling", self._named(Ask("/v1/completions", body), body)))
            tokens -= size
        return made

    def grammars(self) -> list[Question]:
        """Every schema and expression that is asked for: what is compiled of them is kept."""
        asks = [_schema(self._source, self._sizes, number) for number in range(_SCHEMAS)]
        for regex in (*REGEXES, ENDLESS):
            asks.append(_any(self._source, self._sizes, structured_outputs={"regex": regex}))
        return [Question("grammar", self._named(ask, ask.body)) for ask in asks]

    def mixed(self) -> Question:
        """Any: known ones for the most part, some that will be left, a few that are refused."""
        if not self._deck:
            self._deck = [self._known_again] * 12 + [self.fresh] * 3 + [self.left] * 4 + [self.refused]
            self._source.shuffle(self._deck)
        return self._deck.pop()()

    def _known_again(self) -> Question:
        return self.again(next(self._known))

    def again(self, question: Question) -> Question:
        """One of the catalogue, which must get the same answer, with the next drafter and policy."""
        pair = next(self._pairs)
        body = {**question.ask.body, "speculation": self._speculation(pair)}
        ask = Ask(question.ask.path, self._streamed(body), lost=question.ask.lost)
        return Question(question.kind, ask, question.known, pair=pair)

    def fresh(self) -> Question:
        """A request that nobody asked before, sampled without a seed or by rejection."""
        pair = next(self._pairs)
        kind = self._source.choice(list(KINDS))
        ask = KINDS[kind](self._source, self._sizes)
        body = {**ask.body, "speculation": self._speculation(pair)}
        if self._source.random() < 0.5:
            body |= {"seed": self._source.randrange(2**40), "sampling_method": "rejection"}
        return Question(f"{kind}, fresh", self._named(ask, self._streamed(body)), pair=pair)

    def left(self) -> Question:
        """A long answer that its client leaves: at once, after some parts, after some seconds."""
        source, pair = self._source, next(self._pairs)
        path = source.choice(list(_LIMITS))
        body = _put(path, _prompt(source, self._sizes.words), self._sizes.left)
        body |= {"ignore_eos": True, "speculation": self._speculation(pair), "temperature": 1.0}
        if source.random() < 0.3:
            body["structured_outputs"] = {"regex": ENDLESS}
        if path != "/v1/responses":
            body["n"] = source.choice((1, 1, 2))
        body = self._streamed(body)
        after = (
            source.choice((0, 1, 2, 5, 12, 30))
            if "stream" in body
            else source.uniform(0.05, self._sizes.patience)
        )
        return Question("left", self._named(Ask(path, body, leave_after=after), body), pair=pair)

    def refused(self) -> Question:
        """A request that cannot be served."""
        change, status = self._source.choice(REFUSED)
        path = self._source.choice(("/v1/completions", "/v1/chat/completions"))
        body = _put(path, _prompt(self._source, 4), 8)
        if self._source.random() < 0.5:
            body["stream"] = True
        return Question("refused", Ask(path, {"model": self._model, **body, **change}), status=status)

    def _named(self, ask: Ask, body: Body) -> Ask:
        return Ask(ask.path, {"model": self._model, **body}, ask.leave_after, ask.lost)

    def _speculation(self, pair: tuple[str, str]) -> Body:
        drafter, policy = pair
        speculation: Body = {"drafter": drafter}
        if policy != "none":
            speculation["policy"] = policy
        bound = self._source.choice((None, None, 1, 3, 8))
        return speculation | ({} if drafter == "none" or bound is None else {"max_sl": bound})

    def _streamed(self, body: Body) -> Body:
        if "best_of" in body or self._source.random() < 0.5:
            return body
        usage = {} if "input" in body else {"stream_options": {"include_usage": True}}
        return {**body, "stream": True, **usage}


_LIMITS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}


def _put(path: str, prompt: str, tokens: int) -> Body:
    """A body with only a prompt and a limit."""
    if path == "/v1/completions":
        asked: Body = {"prompt": prompt}
    elif path == "/v1/responses":
        asked = {"input": prompt}
    else:
        asked = {"messages": [{"role": "user", "content": prompt}]}
    return asked | {_LIMITS[path]: tokens}


def _prompt(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(source.randint(1, words)))


def _any(source: random.Random, sizes: Sizes, paths: Sequence[str] = tuple(_LIMITS), **fields: Any) -> Ask:
    path = source.choice(paths)
    body = _put(path, _prompt(source, sizes.words), source.randint(1, sizes.tokens))
    return Ask(path, body | {"temperature": source.choice((0.7, 1.0, 1.3))} | fields)


_CHOOSY = ("/v1/completions", "/v1/chat/completions")


def _filtered(source: random.Random, sizes: Sizes) -> Ask:
    filters: tuple[Body, ...] = (
        {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4}, {"bad_words": ["the", "a"]}, {"min_tokens": 4},
    )  # fmt: skip
    ask, chosen = _any(source, sizes), source.choice(filters)
    if least := chosen.get("min_tokens"):
        chosen = {"min_tokens": min(least, ask.body[_LIMITS[ask.path]])}
    return Ask(ask.path, ask.body | chosen)


def _best(source: random.Random, sizes: Sizes) -> Ask:
    n, best = source.choice(((1, 2), (1, 3), (2, 3)))
    ask = _any(source, sizes, ("/v1/completions",), n=n, best_of=best, ignore_eos=True)
    return Ask(ask.path, ask.body, lost=(best - n) * ask.body["max_tokens"])


def _stopped(source: random.Random, sizes: Sizes) -> Ask:
    return _any(source, sizes, stop=source.choice((["e"], [" the", "\n"], [" a", "th", ","])))


def _schema(source: random.Random, sizes: Sizes, number: int | None = None) -> Ask:
    number = source.randrange(_SCHEMAS) if number is None else number
    held = {"name": "answer", "schema": schema(random.Random(number))}
    ask = _any(source, sizes)
    if ask.path == "/v1/completions":
        return Ask(ask.path, ask.body | {"structured_outputs": {"json": held["schema"]}})
    if ask.path == "/v1/responses":
        return Ask(ask.path, ask.body | {"text": {"format": {"type": "json_schema", **held}}})
    return Ask(ask.path, ask.body | {"response_format": {"type": "json_schema", "json_schema": held}})


def _long(source: random.Random, sizes: Sizes) -> Ask:
    path = source.choice(list(_LIMITS))
    prompt = " ".join(source.choice(WORDS) for _ in range(source.randint(sizes.words, sizes.long_words)))
    return Ask(path, _put(path, prompt, source.randint(1, sizes.tokens)) | {"temperature": 1.0})


KINDS: dict[str, Callable[[random.Random, Sizes], Ask]] = {
    "sampled": _any,
    "greedy": lambda source, sizes: _any(source, sizes, temperature=0),
    "filters": _filtered,
    "several choices": lambda source, sizes: _any(source, sizes, _CHOOSY, n=source.choice((2, 3))),
    "best_of": _best,
    "stop strings": _stopped,
    "JSON schema": _schema,
    "regex": lambda source, sizes: _any(source, sizes, structured_outputs={"regex": source.choice(REGEXES)}),
    "long prompt": _long,
    "echo, log-probabilities": lambda source, sizes: _any(
        source, sizes, ("/v1/completions",), echo=True, logprobs=2
    ),
}
"""Requests whose whole answer is read, by the name of their kind."""

REFUSED: tuple[tuple[Body, int], ...] = (
    ({"temperature": -1}, 400),
    ({"nonsense": 1}, 400),
    ({"model": "nobody"}, 404),
    ({"max_tokens": 10**7}, 400),
    ({"structured_outputs": {"regex": "(?=a)b"}}, 400),
    ({"structured_outputs": {"json": {"not": {"type": "string"}}}}, 400),
    ({"speculation": {"policy": "nobody"}}, 400),
    ({"n": 0}, 400),
)
