"""Findings that are made up, to know what must be read from them."""

CATEGORIES = ("single_object", "counting")


def entries(
    rows, *, claims=(), chance=None, shuffled_prompts=0.01, null=0.0, groups=None, steps=100
):
    """Entries of rows {name: scores by seed}; a row 'shuffled' has the captions of others."""
    names = list(rows)
    diffs = {name: {"data.shuffle_captions": True} if name == "shuffled" else {} for name in names}
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
            run(name, seed, score, steps, shuffled_prompts, null)
            for seed, score in enumerate(scores)
        ]
    return found


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
        "by_time": {"0.5": 1.0},
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
    return head | ways | {"saved": saved}


MACHINE = {
    "kind": "machine",
    "devices": 2,
    "device": "core",
    "cpu": "a CPU, 2 cores",
    "python": "3.11",
    "jax": "0.10",
    "t2i_jax": "0.1",
    "commit": "abc",
    "date": "2026-01-01",
    "seconds": 3600,
}
