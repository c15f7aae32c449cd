"""Claims set beside findings: what somebody says of two rows, and what was seen of it.

A suite's CLAIMS are dicts:

    claim    the statement, in words
    where    where it is made
    rows     (row, other): what is compared
    measure  'score' | 'validation_loss' | 'sample' (its time)
    expects  'more' | 'less' | 'not more' | 'not less': of the row, compared with the other

A claim of 'more' agrees where the row has more beyond the interval, and is contradicted where it
has less beyond it. One of 'not less' can agree only where a loss of MARGIN can be ruled out, too:
no difference seen is not the same as none. What no small world can say is UNTESTED: such claims
have no rows, and a reason instead ('why'). A 'note' says what else a reader should know.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from t2i_jax.errors import ConfigError
from t2i_jax.study.findings import Findings
from t2i_jax.study.readings import Difference

MEASURES = ("score", "validation_loss", "sample")
EXPECTS = ("more", "less", "not more", "not less")
MARGIN = {"score": 0.05, "validation_loss": math.log(1.05), "sample": math.log(1.05)}
AGREES, CONTRADICTS, UNDECIDED = "agrees", "contradicted", "not separated"
UNTESTED = "not tested"
ROUNDS = 6  # of timing, below which the extremes are no interval of 95%


class Seen(NamedTuple):
    """What was seen of two rows: of losses and times, the logarithm of their ratio.

    `interval` is of this comparison alone, `joint` of all of the same measure at once.
    """

    value: float
    interval: tuple[float, float]
    joint: tuple[float, float]


class Verdict(NamedTuple):
    """A claim, what was seen of it, the word, and how certain that is."""

    claim: Mapping[str, Any]
    seen: Seen | None
    word: str
    certain: str


def check(claims: Any, rows: Sequence[str], path: Any) -> list[dict[str, Any]]:
    """The claims of a suite's file. Raises ConfigError for one that cannot be judged."""
    out = []
    for claim in claims:
        judged = {"why"} if "why" in claim else {"rows", "measure", "expects"}
        wanted = {"claim", "where"} | judged
        if not isinstance(claim, Mapping) or set(claim) - {"note"} != wanted:
            raise ConfigError(f"{path}: {claim!r} in CLAIMS must have {', '.join(sorted(wanted))}.")
        if "why" not in claim:
            absent = [row for row in claim["rows"] if row not in rows]
            if absent or len(claim["rows"]) != 2:
                raise ConfigError(f"{path}: {claim['claim']!r} is of two rows, {claim['rows']!r}.")
            if claim["measure"] not in MEASURES or claim["expects"] not in EXPECTS:
                raise ConfigError(f"{path}: {claim['claim']!r}: {MEASURES}, {EXPECTS}.")
        out.append({**claim, **({"rows": list(claim["rows"])} if "rows" in claim else {})})
    return out


def judge(findings: Findings) -> list[Verdict]:
    """A verdict on each claim of the suite, those of one measure judged all at once."""
    claims = findings.suite.get("claims", [])
    found: dict[str, dict[tuple[str, str], Seen]] = {"sample": _times(findings, claims)}
    for measure, values in (("score", findings.scores), ("validation_loss", findings.losses)):
        against = findings.against(_pairs(claims, measure), values)
        found[measure] = {p: _around(d) for p, d in against.items() if d.half is not None}
    out = []
    for claim in claims:
        seen = None if "why" in claim else found[claim["measure"]].get(tuple(claim["rows"]))
        word = (UNTESTED, "") if seen is None else _word(seen, claim)
        out.append(Verdict(claim, seen, *word))
    return out


def _pairs(claims: Sequence[Mapping[str, Any]], measure: str) -> list[tuple[str, str]]:
    return [tuple(claim["rows"]) for claim in claims if claim.get("measure") == measure]


def _around(found: Difference) -> Seen:
    alone, joint = found.half, found.all_at_once
    value = found.value
    return Seen(value, (value - alone, value + alone), (value - joint, value + joint))


def _word(seen: Seen, claim: Mapping[str, Any]) -> tuple[str, str]:
    """(AGREES, CONTRADICTS or UNDECIDED; how certainly)."""
    expects = claim["expects"]
    if expects.endswith("less"):  # mirrored, 'less' is 'more'
        seen = Seen(-seen.value, *((-high, -low) for low, high in (seen.interval, seen.joint)))
    if expects.startswith("not"):
        margin = MARGIN[claim["measure"]]
        agrees, contradicts = (lambda i: i[1] <= margin), (lambda i: i[0] > 0)
    else:
        agrees, contradicts = (lambda i: i[0] > 0), (lambda i: i[1] < 0)
    for word, holds in ((CONTRADICTS, contradicts), (AGREES, agrees)):
        if holds(seen.interval):
            return word, "clearly" if holds(seen.joint) else "likely"
    return UNDECIDED, ""


def _times(findings: Findings, claims: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Seen]:
    """Logarithms of ratios of sampling times. Their intervals are those of rounds, not of seeds.

    Too few rounds have none; with several claims on times none is clear.
    """
    pairs, out = _pairs(claims, "sample"), {}
    for pair in pairs:
        if not all(row in findings.speeds for row in pair):
            continue
        one, two = (findings.speeds[row] for row in pair)
        if min(one["rounds"], two["rounds"]) < ROUNDS:
            continue
        one, two = one["sample"], two["sample"]  # ratios to the first row, whose own is 1
        ends = math.log(one["low"] / two["high"]), math.log(one["high"] / two["low"])
        joint = ends if len(pairs) == 1 else (-math.inf, math.inf)
        out[pair] = Seen(math.log(one["ratio"] / two["ratio"]), ends, joint)
    return out
