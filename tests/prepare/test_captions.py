"""Captions are found by their true key, whatever the file, its size, and the hashes."""

import gzip
import json
import logging
import os
import pickle

import numpy as np
import pytest

from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.prepare import archives as published_archives
from t2i_jax.prepare import captions
from t2i_jax.prepare.archives import Damaged
from t2i_jax.prepare.captions import Form, open_lines, open_texts
from tests import archives


def key_of(record):
    return record.get("key")


def group_of(key):
    return int(key[:3])


FORM = Form("text", key_of, '{"key": "0", "text": "..."}')


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def numbered(count):
    return [{"key": f"{i:09d}", "text": f"caption {i} é", "x": [i]} for i in range(count)]


def cause(found, key):
    with pytest.raises(BadSample) as caught:
        found.get(key)
    return caught.value.cause


def as_published(kind, folder):
    """The same 300 lines, as a file of some kind."""
    plain = folder / "train.jsonl"
    write_lines(plain, numbered(300))
    data = plain.read_bytes()
    if kind == "gz":
        (folder / "train.jsonl.gz").write_bytes(gzip.compress(data))
        return folder / "train.jsonl.gz"
    if kind in ("tgz", "tar"):
        members = [("./._train.jsonl", b"mac"), ("./train.jsonl", data), ("README", b"hello")]
        archives.write_tar(folder / f"train.{kind}", members, "w:gz" if kind == "tgz" else "w")
        return folder / f"train.{kind}"
    return plain


@pytest.mark.parametrize("kind", ["jsonl", "gz", "tgz", "tar"])
def test_every_caption_is_found_whatever_the_file(tmp_path, kind):
    path = as_published(kind, tmp_path)
    found = open_lines(str(path), str(tmp_path / "cache"), FORM)
    order = np.random.default_rng(0).permutation(300)
    assert all(found.get(f"{i:09d}") == f"caption {i} é" for i in order)
    assert cause(found, "000000300") == Cause.MISSING_CAPTION
    copies = [p.name for p in tmp_path.glob("cache/*/*.jsonl")]
    assert copies == ([] if kind == "jsonl" else ["lines.jsonl"])


def test_all_kinds_have_one_identity_and_other_captions_another(tmp_path):
    found = {
        open_lines(str(as_published(kind, tmp_path)), str(tmp_path / "cache"), FORM).identity
        for kind in ("jsonl", "gz", "tgz", "tar")
    }
    write_lines(tmp_path / "other.jsonl", numbered(299))
    other = open_lines(str(tmp_path / "other.jsonl"), str(tmp_path / "cache"), FORM)
    assert len(found) == 1 and other.identity not in found


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_collisions_of_hashes_do_no_harm(tmp_path, monkeypatch, bits, grouped):
    true = captions._hash
    monkeypatch.setattr(captions, "_hash", lambda key: true(key) >> 64 - bits << 64 - bits)
    form = Form("text", key_of, "", group_of) if grouped else FORM
    write_lines(tmp_path / "a.jsonl", numbered(120))
    found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), form)
    assert len(np.unique(np.load(found._index)[0])) <= 4
    assert [found.get(f"{i:09d}") for i in range(120)] == [f"caption {i} é" for i in range(120)]
    assert cause(found, "000000999") == Cause.MISSING_CAPTION


def test_the_index_is_two_sorted_rows_of_64_bits(tmp_path):
    write_lines(tmp_path / "a.jsonl", numbered(5000))
    found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), FORM)
    rows = np.load(found._index)
    assert rows.dtype == np.uint64 and rows.shape == (2, 5000)
    assert (np.diff(rows[0].astype(object)) >= 0).all()
    starts = np.cumsum([0] + [len(x) for x in (tmp_path / "a.jsonl").read_bytes().splitlines(True)])
    assert sorted(rows[1]) == starts[:-1].tolist()
    assert captions._hash("000000000") == 0x9D6FD65E9083AB3D  # the same on every machine


def test_of_two_lines_with_one_key_the_first_counts(tmp_path):
    records = [{"key": "a", "text": "first"}, {"key": "b", "text": "b"}]
    write_lines(tmp_path / "a.jsonl", [*records, {"key": "a", "text": "second"}])
    found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), FORM)
    assert found.get("a") == "first" and found.get("b") == "b"


def test_keys_of_a_group_come_in_the_order_of_the_lines(tmp_path):
    names = ["007/b", "000/z", "007/a", "199/c", "007/b"]
    write_lines(tmp_path / "a.jsonl", [{"key": name, "text": name} for name in names])
    form = Form("text", key_of, "", group_of)
    found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), form)
    assert [found.keys(i) for i in (0, 7, 8, 199)] == [["000/z"], ["007/b", "007/a"], [], ["199/c"]]
    assert found.get("199/c") == "199/c"


def test_a_second_run_reads_nothing_anew_and_a_changed_file_is_read_anew(tmp_path, monkeypatch):
    path = as_published("gz", tmp_path)
    first = open_lines(str(path), str(tmp_path / "cache"), FORM)
    with monkeypatch.context() as patch:
        patch.setattr(captions, "_write", None)
        assert open_lines(str(path), str(tmp_path / "cache"), FORM).get("000000007")
    changed = [{"key": "000000007", "text": "new"}]
    path.write_bytes(gzip.compress(json.dumps(changed[0]).encode()))
    second = open_lines(str(path), str(tmp_path / "cache"), FORM)
    assert second.get("000000007") == "new" and second.identity != first.identity
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_index_that_was_not_finished_is_made_again(tmp_path, monkeypatch):
    path = as_published("gz", tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(captions, "_save_sorted", killed)
        open_lines(str(path), str(tmp_path / "cache"), FORM)
    assert [p.name for p in tmp_path.glob("cache/*/*")] == ["lines.jsonl"]
    assert open_lines(str(path), str(tmp_path / "cache"), FORM).get("000000007")


def test_captions_go_to_other_processes_without_their_index(tmp_path):
    write_lines(tmp_path / "a.jsonl", numbered(3000))
    found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), FORM)
    found.get("000000001")
    data = pickle.dumps(found)
    assert len(data) < 2000 and pickle.loads(data).get("000000002") == "caption 2 é"


def test_what_is_wrong_with_a_caption_is_told(tmp_path):
    records = [{"key": "good", "text": "x"}, {"key": "none"}, {"key": "null", "text": None}]
    records += [{"key": "blank", "text": " \n"}, {"key": "list", "text": ["x"]}]
    records += [{"key": "half", "text": "\ud800"}]
    write_lines(tmp_path / "a.jsonl", records)
    found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), FORM)
    assert [cause(found, r["key"]) for r in records[1:]] == [
        Cause.MISSING_CAPTION,
        Cause.MISSING_CAPTION,
        Cause.EMPTY_CAPTION,
        Cause.BROKEN_CAPTION,
        Cause.BROKEN_CAPTION,
    ]


def test_a_field_may_be_inside_of_another(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"key": "a", "Task2": {"Caption": "inner"}}])
    form = Form("Task2.Caption", key_of, "")
    assert open_lines(str(tmp_path / "a.jsonl"), str(tmp_path), form).get("a") == "inner"
    with pytest.raises(ConfigError, match=r"'Task2\.Text'.*\['Task2', 'key'\]"):
        open_lines(str(tmp_path / "a.jsonl"), str(tmp_path), Form("Task2.Text", key_of, ""))


def test_lines_that_are_none_are_counted_and_told(tmp_path, caplog):
    lines = [json.dumps(record) for record in numbered(3)]
    text = "\n".join([lines[0], "", "[1]", '{"other": 1}', "{" * 100_000, *lines[1:]])
    (tmp_path / "a.jsonl").write_text(text + "\n" + lines[0][:20])
    with caplog.at_level(logging.WARNING):
        found = open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), FORM)
    assert "4 lines" in caplog.text and f"byte {len(lines[0]) + 2}." in caplog.text
    assert found.get("000000002") == "caption 2 é"


@pytest.mark.parametrize("content", [b"", b"<html>", b'[{"key": "a"}]', b'{"id": 1}\n'])
def test_a_file_without_such_lines_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r'No line of .*a\.jsonl.*"key"'):
        open_lines(str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), FORM)


@pytest.mark.parametrize("kind", ["gz", "tgz"])
def test_a_file_that_was_cut_is_refused_and_leaves_no_copy(tmp_path, kind):
    path = as_published(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(Damaged, match=rf"{path.name}.*[Dd]ownload it again"):
        open_lines(str(path), str(tmp_path / "cache"), FORM)
    assert not list(tmp_path.glob("cache/*/*"))


def test_missing_and_unsuited_captions(tmp_path):
    with pytest.raises(MissingError, match=r"There is no .*none\.jsonl"):
        open_lines(str(tmp_path / "none.jsonl"), str(tmp_path), FORM)
    with pytest.raises(ConfigError, match="is a folder"):
        open_lines(str(tmp_path), str(tmp_path), FORM)
    archives.write_tar(tmp_path / "two.tar", [("a.jsonl", b"{}"), ("b.jsonl", b"{}")])
    with pytest.raises(ConfigError, match="name one of them"):
        open_lines(str(tmp_path / "two.tar"), str(tmp_path / "cache"), FORM)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        open_texts(str(tmp_path / "empty"), str(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_captions_in_text_files(tmp_path, kind):
    texts = {f"sa_{i}": f"ein Bild, {i} ü".encode() for i in range(40)}
    texts |= {"sa_bad": b"\xff\xfe\x00", "sa_blank": b"\n"}
    path = tmp_path / f"captions.{kind}"
    if kind == "folder":
        path.mkdir()
        for key, data in texts.items():
            (path / f"{key}.txt").write_bytes(data)
    else:
        members = [(f"./SA1B/{key}.txt", data) for key, data in texts.items()]
        members.append(("sa_7.json", b"{}"))
        archives.write_tar(path, members, "w:gz" if kind == "tar.gz" else "w")
    (tmp_path / "secret.txt").write_text("secret")
    found = open_texts(str(path), str(tmp_path / "cache"))
    assert [found.get(f"sa_{i}") for i in range(40)] == [f"ein Bild, {i} ü" for i in range(40)]
    assert cause(found, "sa_bad") == Cause.BROKEN_CAPTION
    assert cause(found, "sa_blank") == Cause.EMPTY_CAPTION
    assert cause(found, "sa_40") == Cause.MISSING_CAPTION
    assert cause(found, "../secret") == Cause.MISSING_CAPTION
    assert cause(found, os.fspath(tmp_path / "secret")) == Cause.MISSING_CAPTION


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_that_was_cut_is_never_taken_for_whole(tmp_path, mode):
    path = tmp_path / "a.tar"
    archives.write_tar(path, [("a.txt", os.urandom(5000)), ("b.txt", b"b")], mode)
    path.write_bytes(path.read_bytes()[:3000])
    with path.open("rb") as file:
        found = published_archives.entries(str(path), file)
        first = next(found)
        with pytest.raises(Damaged, match=r"a\.tar.*Download it again"):
            first.read()
