"""Findings that are made up, to know what must be read from them."""

CATEGORIES = ("single_object", "counting")


DIFFS = {"shuffled": {"data.shuffle_captions": True}, "llm-random": {"pretrain.steps": 0}}


def entries(
    rows, *, claims=(), chance=None, shuffled_prompts=0.01, null=0.0, groups=None, steps=100
):
    """Entries of rows {name: scores by seed}; some names are controls: DIFFS."""
    names = list(rows)
    diffs = {name: DIFFS.get(name, {}) for name in names}
    seeds = max(map(len, rows.values()))
    found = [
        {
            "kind": "suite",
            "name": "made",
            "data": "scenes",
            "steps": steps,
            "batch_size": 4,
            "seeds": list(range(seeds)),
            "images": 100,
            "validation_images": 8,
            "command": "python launch/study.py --suite=made",
            "sampling": "euler, 2 steps, guidance 4",
            "optimizer": "muon",
            "chance": chance,
            "rows": [{"name": name, "diff": diffs[name]} for name in names],
            "groups": groups or {},
            "claims": list(claims),
        }
    ]
    found += [fact(name) for name in names]
    for name, scores in rows.items():
        found += [
            run(name, seed, score, steps, _of(shuffled_prompts, name), _of(null, name))
            for seed, score in enumerate(scores)
        ]
    return found


def _of(value, name):
    """A control's value: of all rows, or {row: value} of some."""
    return value.get(name, 0.01) if isinstance(value, dict) else value


def fact(name, flops=1e9):
    return {
        "kind": "row",
        "row": name,
        "parameters": 1000,
        "conditioning": 200,
        "frozen": {"llm": 500},
        "train_flops": {"dit": flops * 0.9, "llm": flops * 0.1},
        "sample_flops": 1e8,
        "text_flops": 1e6,
    }


def run(name, seed, score, steps=100, shuffled=0.01, null=0.0):
    return {
        "kind": "run",
        "row": name,
        "seed": seed,
        "digest": f"{name}-{seed}",
        "images": 100,
        "score": score,
        "categories": {category: score for category in CATEGORIES},
        "controls": {"shuffled": shuffled, "null": null},
        "validation_loss": 1.0 - score / 2,
        "by_time": {"0.2": 1.0 - score / 2, "0.8": 4 * (1.0 - score / 2)},
        "curves": {
            "score": [[steps // 2, score / 2], [steps, score]],
            "validation_loss": [[steps // 2, 2.0 - score], [steps, 1.0 - score / 2]],
        },
    }


def speed(name, ratio, spread=0.01):
    times = {"median": 0.1 * ratio, "least": 0.1, "most": 0.2, "rounds": 15}
    times |= {"ratio": ratio, "low": ratio * (1 - spread), "high": ratio * (1 + spread)}
    ways = {way: dict(times) for way in ("train", "sample", "recompute")}
    saved = {"ratio": 1.5, "low": 1.4, "high": 1.6}
    head = {"kind": "speed", "row": name, "images": 8, "batch_size": 4, "rounds": 15}
    head |= {"device": "core"}
    return head | ways | {"saved": saved}


MACHINE = {
    "kind": "machine",
    "device": ["core"],
    "cpu": ["a CPU, 2 cores"],
    "python": ["3.11"],
    "jax": ["0.10", "0.11"],
    "t2i_jax": ["0.1"],
    "commit": ["abc", "def"],
    "date": ["2026-01-01", "2026-01-02", "2026-01-03"],
    "runs": 9,
    "seconds": 5400,
}
