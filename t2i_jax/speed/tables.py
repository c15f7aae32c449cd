"""The report of a compiled step as text."""

from typing import Any

_PROGRAMS = {"train": "the step", "sample": "drawing", "encoder": "the encoder, before it"}


def describe(report: dict[str, Any]) -> str:
    """The tree of `compile.train` in lines that fit a terminal."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    verdict = "fits" if report["fits"] else "does NOT fit"
    lines = [
        f"{report['config']}, {report['what']}, on {report['topology']}: {verdict}",
        f"  mesh         {report['devices']} x {report['chip']}: {mesh}",
        f"  batch        {_how(report)}",
        f"  memory       {_memory(report)}",
    ]
    for program, peak in report["peaks"].items():
        lines.append(f"    {_PROGRAMS[program]:<28} {_or_unknown(peak):>10}")
        parts = report["memory"].items() if program == report["what"] else ()
        lines += [f"      {name:<26} {size(count):>10}" for name, count in parts]
    if "problem" in report:
        lines.append(f"  the compiler says: {report['problem']}")
    else:
        lines += _traffic(report) + _work(report)
        lines.append("  largest arrays")
        lines += [
            f"    {size(row['bytes']):>10} {row['type']} x {row['count']}  {row['line']}"
            for row in report["largest"]
        ]
    lines += [f"  try          {text}" for text in report["suggestions"]]
    seconds = report["seconds"]
    text = f"  compiled in  {seconds['compile']} s, traced in {seconds['trace']} s"
    if seconds["compile encoder"]:
        text += f"; the encoder in {seconds['compile encoder']} s"
    lines.append(text)
    return "\n".join(lines)


def _or_unknown(count: float | None) -> str:
    return "too much" if count is None else size(count)


def _memory(report: dict[str, Any]) -> str:
    needed, there = report["bytes_needed"], report["bytes_there"]
    if needed is None:
        return f"{size(there)} a device; it is another memory that does not suffice"
    spare = there - needed
    rest = f"{size(spare)} to spare" if spare >= 0 else f"{size(-spare)} too much"
    return f"{size(needed)} of {size(there)} a device, {rest}"


def _how(report: dict[str, Any]) -> str:
    if report["what"] == "sample":
        return f"{report['batch_size']} images in {report['steps']} steps"
    microbatches = f"{report['accumulation']} microbatch(es)"
    return f"{report['batch_size']} in {microbatches}; remat {report['remat']}"


def by_kind(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Kind of collective -> bytes that a device receives in a step, and those that it must."""
    must = report["ideal_bytes"]
    found = {kind: 0.0 for kind in must}
    for row in report["collectives"]:
        found[row["kind"]] = found.get(row["kind"], 0) + row["bytes"]
    return {kind: (total, must.get(kind, 0)) for kind, total in found.items() if total}


def _traffic(report: dict[str, Any]) -> list[str]:
    ratio = report["collective_ratio"]
    least = sum(report["ideal_bytes"].values())
    text = f"  collectives  {size(report['collective_bytes'])} received by a device in a step"
    lines = [text + (f", {ratio:.3f} x what must be ({size(least)})" if ratio else "")]
    for kind, (total, must) in by_kind(report).items():
        lines.append(f"    {kind:<18} {size(total):>10}, must be {size(must)}")
        for row in (row for row in report["collectives"] if row["kind"] == kind):
            how = "asynchronous" if row["asynchronous"] else "synchronous"
            lines.append(
                f"      {row['dtype']:<16} {size(row['bytes']):>10}  {row['count']:>5} over "
                f"{row['devices']}, {how}"
            )
    return lines


def _work(report: dict[str, Any]) -> list[str]:
    lines = [f"  compute      {report['flops_ratio']:.3f} x the model's FLOPs"]
    model, compiled = report["flops"]["model"], report["flops"]["compiled"]
    for part in sorted(model.keys() | compiled.keys()):
        lines.append(
            f"    {part:<14} {model.get(part, 0) / 1e12:>10.2f} TFLOP of the model, "
            f"{compiled.get(part, 0) / 1e12:.2f} compiled"
        )
    return lines


def size(count: float) -> str:
    """Bytes with a unit: 1.5 GB."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"
