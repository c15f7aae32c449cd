"""The largest batch that fits a machine, by what the backward pass keeps."""

from collections.abc import Callable
import math
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.models.layers import REMAT_POLICIES
from t2i_jax.speed import compile as compiler
from t2i_jax.speed.tables import size

MOST = 64  # rows of a device that are tried


def sweep(
    config: ConfigDict,
    topology: str,
    *,
    latents: bool = False,
    tell: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """{'rows': all reports, 'largest': by policy, of the batches that fit, 'most': tried at all}.

    Policies come in the order of what they keep, the most first, none in the host's memory. Rows a
    device are doubled, from what fitted the policy before, until they do not fit, and then halved
    in between: the largest number that fits, at most `MOST`. `train.accumulation` is 1: of more
    rows than fit, make microbatches. `tell` is called with a line about each. Raises ConfigError
    as `compile.train`.
    """
    rows, largest, start = [], {}, 1
    shards = compiler.shards(config, topology)
    for policy in (name for name in REMAT_POLICIES if name != "offload"):
        changed = config.copy_and_resolve_references().unlock()
        changed.dit.remat, changed.train.accumulation = policy, 1

        def fits(each: int, changed: ConfigDict = changed) -> bool:
            changed.train.batch_size = each * shards
            report = compiler.train(changed, topology, latents=latents)
            rows.append(report)
            tell(line(report, each))
            return report["fits"]

        most = _largest(fits, start)
        if most:
            largest[policy], start = most * shards, most
    return {"rows": rows, "largest": largest, "most": MOST * shards}


def _largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number from 1 to MOST that fits, tried from `start`; 0 if none does."""
    low, each = 0, start
    while fits(each):
        low = each
        if each == MOST:
            return MOST
        each = min(2 * each, MOST)
    high = each
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def line(report: dict[str, Any], each: int) -> str:
    """One row for a terminal."""
    verdict = "fits" if report["fits"] else "does not fit"
    work = f", {report['flops_ratio']:.3f} x FLOPs" if "flops_ratio" in report else ""
    needed = size(report["bytes_needed"] or math.nan)
    return (
        f"{report['remat']:<9} {report['batch_size']:>6} ({each:>2} a device)  "
        f"{needed:>10} of {size(report['bytes_there'])}, {verdict}{work}"
    )


def describe(found: dict[str, Any]) -> str:
    """What to take from a sweep."""
    if not found["largest"]:
        return "Nothing fits, not even one image a device: this needs more devices."
    most = found["most"]
    return "The largest batch that fits:\n" + "\n".join(
        f"  {policy:<9} {'at least ' if batch == most else ''}{batch}"
        for policy, batch in found["largest"].items()
    )
