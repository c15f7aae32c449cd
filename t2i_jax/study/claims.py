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
from t2i_jax.study.readings import CLEAR, OPEN, Difference

MEASURES = ("score", "validation_loss", "sample")
EXPECTS = ("more", "less", "not more", "not less")
MARGIN = {"score": 0.05, "validation_loss": math.log(1.05), "sample": math.log(1.05)}
AGREES, CONTRADICTS, UNDECIDED = "agrees", "contradicted", "not separated"
UNTESTED = "not tested"


class Verdict(NamedTuple):
    """A claim, the difference that was seen (of the logarithm, for losses and times), the word."""

    claim: Mapping[str, Any]
    seen: Difference | None
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
    seen = {
        measure: findings.against(_pairs(claims, measure), values)
        for measure, values in (("score", findings.scores), ("validation_loss", findings.losses))
    }
    seen["sample"] = {
        pair: found for pair in _pairs(claims, "sample") if (found := _times(findings, *pair))
    }
    out = []
    for claim in claims:
        if "why" in claim:
            out.append(Verdict(claim, None, UNTESTED, ""))
            continue
        found = seen[claim["measure"]].get(tuple(claim["rows"]))
        if found is None or found.half is None:
            out.append(Verdict(claim, found, UNTESTED, ""))
            continue
        out.append(Verdict(claim, found, *_word(found, claim["expects"], MARGIN[claim["measure"]])))
    return out


def _pairs(claims: Sequence[Mapping[str, Any]], measure: str) -> list[tuple[str, str]]:
    return [tuple(claim["rows"]) for claim in claims if claim.get("measure") == measure]


def _word(seen: Difference, expects: str, margin: float) -> tuple[str, str]:
    """(AGREES, CONTRADICTS or UNDECIDED; how certainly)."""
    upwards = expects.endswith("more")
    value = seen.value if upwards else -seen.value
    certain = "clearly" if seen.sign == CLEAR else "likely"
    if not expects.startswith("not"):
        if seen.sign == OPEN:
            return UNDECIDED, ""
        return (AGREES if value > 0 else CONTRADICTS), certain
    if seen.sign != OPEN and value > 0:
        return CONTRADICTS, certain
    if value + seen.half <= margin:
        return AGREES, "clearly" if value + seen.all_at_once <= margin else "likely"
    return UNDECIDED, ""


def _times(findings: Findings, row: str, other: str) -> Difference | None:
    """The logarithm of a ratio of sampling times; its interval is that of rounds, not of seeds."""
    if row not in findings.speeds or other not in findings.speeds:
        return None
    one, two = (findings.speeds[name]["sample"] for name in (row, other))
    value = math.log(one["ratio"] / two["ratio"])
    # Both are ratios to the first row, whose own is 1.
    half = sum(math.log(x["high"] / x["low"]) / 2 for x in (one, two))
    return Difference(value, half, half, 1)
