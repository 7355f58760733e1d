// Sums over the passes of the target, as the server tells them. No document in here.

/** What came of one answer so far. Times in milliseconds of one clock. */
export class Tally {
  constructor(started) {
    this.started = started;
    this.first = this.last = null; // when the first and the newest tokens came
    this.passes = [];
    this.tokens = this.iterations = this.drafted = this.longest = this.accepted = this.emitted = 0;
    this.finish = null;
    this.told = null; // the server's own statistics, with the last chunk
  }

  /** Takes the choice of a chunk in; returns its new passes. */
  take(chunk, now) {
    const [choice] = chunk.choices;
    if (!choice) return [];
    const news = choice.passes ?? [];
    for (const pass of news) {
      this.passes.push(pass);
      this.tokens += pass.tokens.length;
      if (!pass.iteration) continue;
      this.iterations += 1;
      this.drafted += pass.drafted;
      this.longest += pass.lookahead;
      this.accepted += pass.accepted;
      this.emitted += pass.tokens.length;
    }
    if (news.some((pass) => pass.tokens.length)) {
      this.first ??= now;
      this.last = now;
    }
    this.finish = choice.finish_reason ?? this.finish;
    this.told = chunk.speculation ?? this.told;
    return news;
  }

  get acceptance() {
    return ratio(this.accepted, this.drafted);
  }

  get averageSl() {
    return ratio(this.longest, this.iterations);
  }

  get perPass() {
    return ratio(this.emitted, this.iterations);
  }

  /** Tokens of the iterations by seconds since the first token. */
  get speed() {
    return ratio(this.emitted, (this.last - this.first) / 1000);
  }

  get firstSeconds() {
    return this.first === null ? null : (this.first - this.started) / 1000;
  }

  get ids() {
    return this.passes.flatMap((pass) => pass.tokens.map((token) => token.id));
  }
}

function ratio(part, whole) {
  return whole ? part / whole : null;
}

/** A pass in words. `number` counts iterations from 1. */
export function inWords(pass, number) {
  if (!pass.iteration) return "Pass over the prompt, which gives the first token";
  const own = pass.tokens.find((token) => token.origin !== "draft");
  const ends = {
    correction: "then the target corrected",
    bonus: "then a bonus token",
    target: "the target’s own token",
  };
  const tree = pass.drafted > pass.lookahead ? ` in a tree ${pass.lookahead} deep` : "";
  const drafted = pass.drafted ? `drafted ${pass.drafted}${tree}, accepted ${pass.accepted}` : "nothing drafted";
  const end = own ? `, ${ends[own.origin]}` : "";
  const why = pass.stop_reason ? `; drafting stopped by ${pass.stop_reason}` : "";
  return `Iteration ${number}: ${drafted}${end}${why}`;
}

/** The first place where two lists differ; -1 if they are the same. */
export function firstDifference(a, b) {
  const length = Math.max(a.length, b.length);
  for (let i = 0; i < length; i++) if (a[i] !== b[i]) return i;
  return -1;
}
