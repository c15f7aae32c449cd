"""The report: what it says of made-up findings, and that the committed one is that of its data."""

from pathlib import Path
import re
import shutil

import pytest

from t2i_jax.study import claims, commands, controls, report, results
from t2i_jax.study.findings import Findings
from tests.study import made

DOCS = Path(__file__).resolve().parents[2] / "docs"
FULL = {"baseline": [0.50, 0.54, 0.52], "good": [0.80, 0.86, 0.83], "same": [0.51, 0.54, 0.51]}


def page(entries, tmp_path):
    report.write(entries, tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


# --- the committed study ---


@pytest.fixture(scope="module")
def committed():
    return results.read(DOCS / "study" / results.NAME)


def test_the_committed_study_is_made_again_from_its_results(committed, tmp_path):
    (tmp_path / "study").mkdir()
    if (DOCS / "study" / report.SHEET).exists():  # needs the trained models
        shutil.copy(DOCS / "study" / report.SHEET, tmp_path / "study")
    commands.again(str(DOCS / "study" / results.NAME), str(tmp_path / "study.md"))
    assert (tmp_path / "study.md").read_text() == (DOCS / "study.md").read_text()
    for name in (results.NAME,):
        assert (tmp_path / "study" / name).read_text() == (DOCS / "study" / name).read_text()
    pictures = {file.name for file in (DOCS / "study").glob("*.png")}
    assert pictures == {file.name for file in (tmp_path / "study").glob("*.png")}


def test_the_committed_study_is_whole(committed):
    found = Findings(committed)
    seeds = found.suite["seeds"]
    assert len(seeds) >= 3 and not found.failed
    assert list(found.diffs) == found.rows == list(found.speeds)
    assert all(sorted(found.runs[row]) == seeds for row in found.rows)
    assert found.machine["commit"] and found.machine["seconds"] > 0


def test_its_controls_came_out_right(committed):
    found = controls.check(Findings(committed))
    assert all(control.passed for control in found)
    told = " ".join(control.text for control in found)
    for words in ("chance", "prompts of others", "empty prompt", "shuffled-captions", "llm-random"):
        assert words in told


def test_its_designs_are_neither_at_the_floor_nor_at_the_ceiling(committed):
    found = Findings(committed)
    scores = {row: r.value for row, r in found.means(found.scores).items()}
    chance = found.suite["chance"][0] / found.suite["chance"][1]
    assert 10 * chance < scores[found.first] < 0.9
    assert max(scores.values()) < 0.95
    clear = [row for row, d in found.against_first(found.scores).items() if d.sign == "clear"]
    assert set(clear) - set(found.floor)  # it separates designs


def test_no_claim_without_a_figure(committed):
    text = (DOCS / "study.md").read_text()
    for verdict in claims.judge(Findings(committed)):
        line = next(
            line for line in text.splitlines() if line.startswith(f"| {verdict.claim['claim']}")
        )
        assert "why" in verdict.claim or re.search(r"\d\.\d{3}( x)? \(", line), line
        assert verdict.word in line


# --- made-up findings ---


def test_differences_stand_in_their_weight(tmp_path):
    text = page([*made.entries(FULL), made.MACHINE], tmp_path)
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert "**+0.310**" in text and "0.520 ±" in text
    same = next(line for line in text.splitlines() if line.startswith("| `same`"))
    assert "+0.000 ±" in same and "*" not in same
    assert set(lines) == set(FULL)
    assert "- clearly better than `baseline`, by score: `good`" in text
    assert "- not separated from `baseline`, by score: `same`" in text
    assert "likely" not in text.split("## What was seen")[0]
    assert "on a CPU, 2 cores, 2026-01-01 to 2026-01-03, a training on one core: 10.0 min" in text
    assert "commit abc and def; jax 0.10 and 0.11" in text


def test_losses_are_ratios_of_geometric_means(tmp_path):
    rows = {"first": [0.2, 0.3], "other": [0.6, 0.6]}
    text = page(made.entries(rows), tmp_path).split("## Held-out loss")[1]
    # Of one seed 0.7 / 0.9, of the other 0.7 / 0.85, at either noise level.
    assert f"| `other` | {(0.7 / 0.9 * 0.7 / 0.85) ** 0.5:.3f} x" in text


def test_equal_flops_read_both_at_the_cheaper_ones(tmp_path):
    entries = made.entries(FULL)
    for entry in entries:
        if entry["kind"] == "row" and entry["row"] == "good":
            entry["train_flops"] = {"dit": 2e9}
    found = Findings(entries).at_equal_flops()["good"]
    # `good` is read at step 50 of 100, where it has half of its score.
    assert found.value == pytest.approx(0.83 / 2 - 0.52)


def test_what_there_is_nothing_of_is_left_out(tmp_path):
    entries = made.entries({"only": [0.5]})
    entries[-1] |= {"score": None, "categories": {}, "controls": {}, "by_time": {}}
    entries[-1]["curves"]["score"] = []
    text = page(entries, tmp_path)
    assert (
        "## Speed" not in text
        and "## Claims" not in text
        and "score" not in text.split("## What was seen")[1].split("##")[0]
    )


def test_a_run_that_diverged_is_told(tmp_path):
    entries = made.entries(FULL)
    failed = {"kind": "run", "row": "good", "seed": 3, "digest": "d", "failed": "Step 7: loss nan"}
    text = page([*entries, failed], tmp_path)
    assert "`good`, seed 3, diverged: Step 7: loss nan" in text


def test_one_file_always_gives_one_page(tmp_path):
    entries = [*made.entries(FULL), made.speed("baseline", 1.0), made.speed("good", 1.2)]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        page(entries, folder)
    for file in one.rglob("*.*"):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes(), file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no entry of kind 'suite'"),
        ("{}\n", "line 1 is not an entry"),
        ("nonsense\n", "line 1 is not an entry"),
    ],
)
def test_files_that_are_no_findings(tmp_path, text, message):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        commands.again(str(tmp_path / "results.jsonl"), None)


def test_findings_without_a_run_of_the_first_row(tmp_path):
    with pytest.raises(ValueError, match="No run of 'first' has ended"):
        page(made.entries({"first": [0.1]})[:2], tmp_path)
    entries = made.entries({"first": [0.1], "other": [0.2]})
    with pytest.raises(ValueError, match="No run of 'first' has ended"):
        page([e for e in entries if e["kind"] != "run" or e["row"] != "first"], tmp_path)


def test_one_row_alone_is_a_report(tmp_path):
    for rows in ({"first": [0.5, 0.6]}, {"first": [0.5, 0.6], "shuffled": [0.0, 0.01]}):
        assert "`first`" in page(made.entries(rows, chance=(20, 1000)), tmp_path)


def test_rows_that_are_not_above_chance_have_no_say_in_the_spread():
    rows = {"first": [0.5, 0.6, 0.4], "a": [0.4, 0.55, 0.7], "dead": [0.0, 0.02, 0.01]}
    found = Findings(made.entries(rows, chance=(20, 1000)))
    assert found.floor == ["dead"] and found.controls == []
    assert found.means(found.scores)["dead"].half is None
