"""The artifact contract: all or nothing, one writer, damage is seen, and what decides a fingerprint."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clean import Config
from pipeline.core import artifact, files, lock, partial_runs
from pipeline.core.changes import differences, explain, file_differences
from pipeline.core.errors import UserError
from pipeline.core.fingerprint import fingerprint_of
from pipeline.core.fork import NothingToFork
from pipeline.core.lock import Lock
from pipeline.core.output import Output
from pipeline.core.partial_runs import tidy
from pipeline.core.recipe import load
from pipeline.core.status import as_run, examine

IDENTITY = {"kind": "pack", "version": 1, "config": {"a": 1}, "parents": {}}
MARKER = b'{"files": {}}'
TORN = (
    ("checkpoints/step-000015/complete.json", b'{"files": {"state": {"size": 2, "sha256": ""}}}'),
    ("checkpoints/step-000015/state", b"x"),
)


def make(
    folder: Path, identity=IDENTITY, content=(("data/one.bin", b"one"), ("two.json", b"{}")), publish=True, **how
) -> Output:
    output = Output(folder, "pack", "pack", identity).open(config={"a": 1}, parents={}, **how)
    if output.published is None:
        for name, data in content:
            files.write_atomic(output.path / name, data)
        if publish:
            output.publish({"rows": 2})
    output.close()
    return output


def test_published_output_is_complete_linked_and_read_back(tmp_path):
    make(tmp_path / "pack")
    found = artifact.current(tmp_path / "pack")
    assert (found.path / "data/one.bin").read_bytes() == b"one"
    assert found.damage(full=True) is None
    assert found.metrics == {"rows": 2}
    assert set(found.manifest["files"]) == {"data/one.bin", "two.json"}
    # printf one | sha256sum
    assert (
        found.manifest["files"]["data/one.bin"]["sha256"]
        == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    )
    assert found.path.name == fingerprint_of(IDENTITY)[:12]
    assert not (tmp_path / "pack/lock.json").exists()


def test_logs_and_checkpoints_are_not_content(tmp_path):
    first = make(tmp_path / "a")
    second = make(
        tmp_path / "b",
        content=(
            ("data/one.bin", b"one"),
            ("two.json", b"{}"),
            ("metrics.jsonl", b"x"),
            ("checkpoints/step-000001/s", b"y"),
            ("work/u", b"z"),
        ),
    )
    assert artifact.read(first.path).digest == artifact.read(second.path).digest
    assert not (second.path / "work").exists()


def test_unpublished_output_is_not_seen_and_is_continued(tmp_path):
    output = make(tmp_path / "pack", publish=False)
    assert artifact.current(tmp_path / "pack") is None
    again = Output(tmp_path / "pack", "pack", "pack", IDENTITY).open(config={}, parents={})
    assert again.path == output.path and (again.path / "two.json").exists() and again.info["resumed"] == 1
    again.close()


def test_changed_recipe_under_unfinished_run_is_refused_with_the_difference(tmp_path):
    make(tmp_path / "pack", publish=False)
    changed = {**IDENTITY, "config": {"a": 2}}
    with pytest.raises(UserError, match=r"a: 1 -> 2.*--restart to start again$"):
        make(tmp_path / "pack", changed)
    make(tmp_path / "pack", changed, restart=True)
    assert artifact.current(tmp_path / "pack").manifest["identity"] == changed
    assert len(list((tmp_path / "pack").glob("*.abandoned-*"))) == 1  # nothing is deleted by a run


def test_restart_of_a_published_output_replaces_it(tmp_path):
    before = make(tmp_path / "pack").path
    make(tmp_path / "pack", content=(("three", b"3"),), restart=True)
    assert set(artifact.current(tmp_path / "pack").manifest["files"]) == {"three"}
    assert len(list((tmp_path / "pack").glob(before.name + ".replaced-*"))) == 1


def test_a_run_that_ended_before_any_work_is_in_nobodys_way(tmp_path):
    make(tmp_path / "pack", content=(("metrics.jsonl", b""),), publish=False)
    make(tmp_path / "pack", {**IDENTITY, "config": {"a": 2}})
    assert artifact.current(tmp_path / "pack").manifest["identity"]["config"] == {"a": 2}
    assert not list((tmp_path / "pack").glob("*.partial"))


def test_fork_goes_on_from_the_last_complete_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        make(tmp_path / "none", fork=True)
    make(
        tmp_path / "pack",
        content=(
            ("x", b"x"),
            ("checkpoints/step-000010/complete.json", MARKER),
            *TORN,
            ("checkpoints/step-000020/half", b""),
        ),
    )
    changed = {**IDENTITY, "config": {"a": 2}}
    output = make(tmp_path / "pack", changed, fork=True)
    assert (output.path / "checkpoints/step-000010/complete.json").exists()
    assert not (output.path / "checkpoints/step-000015").exists(), (
        "its file is cut off: neither forked from nor named as the parent"
    )
    assert not (output.path / "checkpoints/step-000020").exists()
    assert artifact.current(tmp_path / "pack").manifest["forked_from"].endswith("/step-000010")


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda path: (path / "two.json").unlink(), "two.json is missing"),
        (lambda path: (path / "two.json").write_bytes(b"{ }"), "has 3 bytes, expected 2"),
        (lambda path: (path / "two.json").write_bytes(b"[]"), "has sha256"),
    ],
)
def test_damage_is_named_and_made_good(tmp_path, harm, said):
    output = make(tmp_path / "pack")
    harm(output.path)
    assert said in artifact.current(tmp_path / "pack").damage()
    make(tmp_path / "pack")  # the same fingerprint again: the damaged folder is set aside, not overwritten
    assert artifact.current(tmp_path / "pack").damage(full=True) is None
    assert len(list((tmp_path / "pack").glob("*.damaged-*"))) == 1


def test_a_bit_flipped_in_place_is_found_by_full_verification(tmp_path):
    path = make(tmp_path / "pack").path / "data/one.bin"
    before = path.stat()
    path.write_bytes(b"ona")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = artifact.current(tmp_path / "pack")
    assert found.damage() is None and "has sha256" in found.damage(full=True)


def test_a_copied_run_folder_is_still_whole(tmp_path):
    import shutil

    make(tmp_path / "pack")
    shutil.copytree(tmp_path / "pack", tmp_path / "copy", symlinks=True)
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, follow_symlinks=False)
    assert artifact.current(tmp_path / "copy").damage() is None


@pytest.mark.parametrize("original", [True, False])
def test_a_run_folder_copied_without_its_links_gets_them_back(tmp_path, original):
    """cp -rL, rsync -L and object stores make a folder of `current`."""
    import shutil

    from pipeline.core.output import link

    output = artifact.read(make(tmp_path / "pack").path)
    shutil.copytree(tmp_path / "pack", tmp_path / "copy")
    assert not (tmp_path / "copy/current").is_symlink()
    if not original:
        shutil.rmtree(tmp_path / "copy" / output.path.name)
    for _ in range(2):
        published = artifact.current(tmp_path / "copy")
        assert published.digest == output.digest and published.damage() is None
        link(tmp_path / "copy", published.path)
    assert os.readlink(tmp_path / "copy/current") == output.path.name


def test_unreadable_manifest_is_an_error_not_an_absence(tmp_path):
    output = make(tmp_path / "pack")
    (output.path / "manifest.json").write_text('{"stage": ')
    with pytest.raises(UserError, match="manifest.json: damaged, not JSON"):
        artifact.current(tmp_path / "pack")


def _publish_and_die(folder, count):
    os.environ["ALMA_FAULT"] = f"publish:{count}"
    make(Path(folder))


@pytest.mark.parametrize("count", [1, 2])
def test_death_in_publish_leaves_all_or_nothing_and_is_continued(tmp_path, count):
    process = multiprocessing.get_context("forkserver").Process(
        target=_publish_and_die, args=(str(tmp_path / "pack"), count)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert artifact.current(tmp_path / "pack") is None  # killed before the link: not there for a reader
    output = Output(tmp_path / "pack", "pack", "pack", IDENTITY).open(config={}, parents={})
    if count == 2:  # after the rename: complete, only the link was missing
        assert output.published and artifact.current(tmp_path / "pack").damage(full=True) is None
    else:
        assert output.published is None and (output.path / "two.json").exists()
        output.publish({"rows": 2})
    output.close()
    assert artifact.current(tmp_path / "pack").damage(full=True) is None


def _hold(folder, ready):
    held = Lock(Path(folder))
    held.acquire()
    ready.set()
    time.sleep(60)


def test_one_writer_and_a_dead_holder_is_taken_over(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match=f"process {holder.pid} on "):
        Lock(tmp_path).acquire()
    holder.kill()
    holder.join()
    held = Lock(tmp_path)
    held.acquire()
    assert lock.lock_holder(tmp_path)["pid"] == os.getpid()
    held.release()
    assert lock.lock_holder(tmp_path) is None
    assert not list(tmp_path.glob(".lock.*"))


def test_holder_on_another_host_is_dead_only_without_heartbeat(tmp_path):
    files.write_json(
        tmp_path / "lock.json", {"host": "elsewhere", "pid": 1, "born": 1, "job": "77", "token": "t", "since": "then"}
    )
    with pytest.raises(UserError, match="process 1 on elsewhere, job 77"):
        Lock(tmp_path).acquire()
    old = time.time() - 2 * lock.DEAD_AFTER_SECONDS
    os.utime(tmp_path / "lock.json", (old, old))
    held = Lock(tmp_path)
    held.acquire()
    held.release()


def _grab(folder, gate, results, over):
    held = Lock(Path(folder))
    gate.wait()
    try:
        held.acquire()
        results.put(1)
        over.wait(120)  # a holder that ended would rightly be followed by another
    except UserError:
        results.put(0)


def test_many_takers_of_a_dead_lock_one_winner(tmp_path):
    context = multiprocessing.get_context("forkserver")
    files.write_json(
        tmp_path / "lock.json",
        {"host": socket.gethostname(), "pid": 1, "born": -1, "job": None, "token": "dead", "since": "then"},
    )
    gate, results, over = context.Event(), context.Queue(), context.Event()
    takers = [context.Process(target=_grab, args=(str(tmp_path), gate, results, over)) for _ in range(6)]
    for taker in takers:
        taker.start()
    gate.set()
    assert sum(results.get(timeout=100) for _ in takers) == 1
    over.set()
    for taker in takers:
        taker.join()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_fingerprint_does_not_depend_on_key_order(value):
    backwards = json.loads(json.dumps(dict(reversed(list(value.items())))))
    assert fingerprint_of(value) == fingerprint_of(backwards)


@given(json_values, json_values)
def test_differences_are_empty_only_for_equal_values(before, after):
    found = differences({"k": before}, {"k": after})
    assert (found == []) == (fingerprint_of({"k": before}) == fingerprint_of({"k": after}))
    for phrase in found:  # the two sides of a phrase are never the same: correctness 46
        old, arrow, new = phrase.partition(": ")[2].partition(" -> ")
        assert not arrow or old != new or " -> " in new, phrase


FILES = [[f"{name}.jsonl", name * 64] for name in "abcdefgh"]


@pytest.mark.parametrize(
    "before, after, said",
    [
        (FILES[:2], FILES[:2] + FILES[3:], ["5 files added (d.jsonl, e.jsonl, f.jsonl and 2 more)"]),
        (FILES[:2], FILES[:1], ["1 file removed (b.jsonl)"]),
        ([*FILES[:7], ["h.jsonl", "0"]], FILES, ["1 file changed (h.jsonl)"]),
        (FILES[:2], [FILES[0], ["z.jsonl", "b" * 64]], ["1 file renamed (b.jsonl -> z.jsonl)"]),
        (FILES[:2], FILES[1::-1], ["2 files in another order"]),
        # files of one name in several folders, as shards have them; the second hash is of an index
        (
            [["0.npy", "a", "i"], ["0.npy", "b", "i"]],
            [["0.npy", "a", "i"], ["0.npy", "b", "j"]],
            ["1 file changed (0.npy)"],
        ),
        ([["0.npy", "a"], ["0.npy", "b"]], [["0.npy", "a"]], ["1 file removed (0.npy)"]),
        (FILES[:1], [["a.jsonl", "1"], ["数据.jsonl", "2"]], ["1 file added (数据.jsonl)", "1 file changed (a.jsonl)"]),
        (FILES, FILES, []),
    ],
)
def test_what_happened_to_the_files_of_a_source_is_said(before, after, said):
    """correctness 46."""
    assert file_differences(before, after) == said
    sources = [{"sources": {"web": {"files": files}}} for files in (before, after)]
    assert differences(*sources) == ([f"sources.web: {', '.join(said)}"] if said else [])


@pytest.mark.parametrize(
    "before, after, said",
    [
        ({}, {"optimizer": {"lr": 0.1}}, "optimizer.lr: 0.001 (default) -> 0.1"),
        ({"optimizer": {"lr": 0.1}}, {}, "optimizer.lr: 0.1 -> 0.001 (default)"),
        ({"limit": 3}, {}, "limit: 3 -> none (default)"),
        ({}, {"model": {"hidden_size": 64}}, "model.hidden_size: not given -> 64"),
        ({"template": "x" * 200 + "a"}, {"template": "x" * 200 + "b"}, "a -> …" + "x" * 40 + "b"),
        ({"text": "1"}, {"text": 1}, 'text: "1" -> 1'),
        (
            {"words": [f"w{i}" for i in range(90)]},
            {"words": [f"w{i}" for i in range(1, 92)]},
            'words: 2 entries added ("w90", "w91"), 1 entry removed ("w0")',
        ),
        ({"words": ["word"] * 40 + ["x"]}, {"words": ["x"] + ["word"] * 40}, "words: its 41 entries in another order"),
        (
            {"phases": [{"steps": 5, "note": "n" * 90}]},
            {"phases": [{"steps": 6, "note": "n" * 90}]},
            "phases[0].steps: 5 -> 6",
        ),
    ],
)
def test_what_a_key_was_and_is_is_said_defaults_too(before, after, said):
    """correctness 46: a key at its default is not in an identity."""
    defaults = {"optimizer": {"lr": 0.001, "kind": "adamw"}, "limit": None, "model": {}}
    full = [{**defaults, **config} for config in (before, after)]
    (found,) = differences({"config": before}, {"config": after}, *full)
    assert said in found


def test_sources_that_come_and_go_and_lists_are_named():
    """correctness 46: sources, shards, decontaminate sets, examples, block lists, adopted files."""
    listed = [["a.txt", "1"], ["b.txt", "2"]]
    before = {
        "old": {"files": listed}, "decontaminate.gsm": {"files": listed}, "@lists": listed,
        "@examples": {"good": {"files": listed}}, "kept": {"limit": 3, "files": listed},
    }  # fmt: skip
    after = {
        "new": {"files": listed}, "decontaminate.gsm": {"files": listed[:1]}, "@lists": listed[1:],
        "@examples": {"good": {"files": [["a.txt", "3"], listed[1]]}},
        "kept": {"files": listed},
    }  # fmt: skip
    config = {"sources": {"kept": {"limit": None}}}
    config_before = {"sources": {"kept": {"limit": 3}}}
    assert differences({"sources": before}, {"sources": after}, config_before, config, "clean") == [
        "examples.good: 1 file changed (a.txt)",
        "block: 1 file removed (a.txt)",
        "decontaminate.sets.gsm: 1 file removed (b.txt)",
        "sources.kept.limit: 3 -> none (default)",
        "sources.new: added (2 files: a.txt, b.txt)",
        "sources.old: removed (2 files: a.txt, b.txt)",
    ]
    before, after = {"tokens": {"files": listed}}, {"tokens": {"files": listed[::-1]}}
    assert differences({"sources": before}, {"sources": after}, kind="pack") == [
        "shards.tokens: 2 files in another order"
    ]
    assert differences({"sources": {"@outside": listed}}, {"sources": {"@outside": []}}, kind="tokenizer") == [
        "adopt: 2 files removed (a.txt, b.txt)"
    ]


@pytest.mark.parametrize("mistake", ["ended with an error", "training without a checkpoint"])
def test_an_unfinished_run_that_cannot_be_resumed_does_not_block_a_corrected_recipe(tmp_path, mistake, capsys):
    """correctness 48."""
    kind = "pretrain" if mistake.startswith("training") else "pack"
    output = Output(tmp_path / "pack", "pack", kind, IDENTITY).open(config={"a": 1}, parents={})
    files.write_atomic(output.path / "work/units/1", b"hours of work")
    if mistake.startswith("ended"):
        output.end_with_error("no document is left for heldout; change `holdout`")
    output.close()
    make(tmp_path / "pack", {**IDENTITY, "config": {"a": 2}})
    assert artifact.current(tmp_path / "pack").manifest["identity"]["config"] == {"a": 2}
    (kept,) = (tmp_path / "pack").glob("*.failed-*")
    assert (kept / "work/units/1").read_bytes() == b"hours of work" and kept.name in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "lacks config"),
        ('{"identity": {}}', "lacks config"),
        (None, "config is '3'"),
    ],
    ids=["empty", "nested", "list", "other keys", "another type"],
)
@pytest.mark.parametrize("recipe", ["same", "other"])
def test_an_unfinished_run_that_says_no_more_what_it_is_can_be_set_aside(tmp_path, content, said, recipe):
    """correctness 33: run.json as a disk left it."""
    output = make(tmp_path / "pack", publish=False)
    known = output.path / "run.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {"config": 3}) if content is None else content)
    identity = IDENTITY if recipe == "same" else {**IDENTITY, "version": 2}
    with pytest.raises(UserError, match=rf"run.json: damaged, {said}.*--restart"):
        make(tmp_path / "pack", identity)
    make(tmp_path / "pack", identity, restart=True)
    assert artifact.current(tmp_path / "pack").manifest["identity"] == identity
    assert len(list((tmp_path / "pack").glob("*.damaged-*/data/one.bin"))) == 1


def test_a_folder_in_place_of_a_lock_is_a_sentence(tmp_path):
    """correctness 33."""
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(UserError, match="lock.json: is a folder"):
        Lock(tmp_path).acquire()


def test_an_error_of_a_run_that_was_resumed_since_is_forgotten(tmp_path):
    """correctness 48: killed later on, it has work that a resume needs."""
    output = make(tmp_path / "pack", publish=False)
    output.end_with_error("more bad records than max_bad")
    make(tmp_path / "pack", publish=False)
    with pytest.raises(UserError, match="made by another recipe"):
        make(tmp_path / "pack", {**IDENTITY, "config": {"a": 2}})


def test_a_fork_that_fails_leaves_the_run_it_came_from(tmp_path):
    """correctness 48: such as a fork to other shapes, or to a horizon behind its checkpoint."""
    content = (("x", b"x"), ("checkpoints/step-000010/complete.json", MARKER))
    before = make(tmp_path / "pack", content=content, publish=False)
    changed = {**IDENTITY, "config": {"a": 2}}
    output = Output(tmp_path / "pack", "pack", "pack", changed).open(config={}, parents={}, fork=True)
    output.end_with_error("the recipe asks for other shapes")
    output.close()
    assert [path.name for path in (tmp_path / "pack").iterdir()] == [before.path.name]
    make(tmp_path / "pack", content=content)  # the first recipe continues


def test_a_fork_to_fewer_steps_than_any_checkpoint_is_refused(tmp_path):
    """correctness 48."""
    make(tmp_path / "pack", content=(("x", b"x"), ("checkpoints/step-000010/complete.json", MARKER)))
    output = Output(tmp_path / "pack", "pack", "pack", {**IDENTITY, "config": {"a": 3}})
    with pytest.raises(UserError, match=r"is at step-000010 already and the recipe asks for 5 steps") as caught:
        output.open(config={}, parents={}, fork=True, last_step=5)
    assert not isinstance(caught.value, NothingToFork)  # which alma run would take for "start from step 0"


def _open_and_die(folder, identity, how, fault):
    os.environ["ALMA_FAULT"] = fault
    make(Path(folder), identity, **how)


def test_death_in_a_fork_keeps_its_lineage_and_the_same_command_goes_on(tmp_path):
    content = (("x", b"x"), ("checkpoints/step-000010/complete.json", MARKER))
    make(tmp_path / "pack", content=content, publish=False)
    changed = {**IDENTITY, "config": {"a": 2}}
    process = multiprocessing.get_context("forkserver").Process(
        target=_open_and_die, args=(str(tmp_path / "pack"), changed, {"fork": True}, "fork:1")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and artifact.current(tmp_path / "pack") is None
    make(tmp_path / "pack", changed, fork=True)
    found = artifact.current(tmp_path / "pack")
    assert found.manifest["forked_from"].endswith("/step-000010") and found.manifest["resumed"] == 1
    assert (found.path / "checkpoints/step-000010/complete.json").exists()
    assert len(list((tmp_path / "pack").glob("*.abandoned-*"))) == 1


def test_a_fork_needs_the_same_inputs_and_steps_left(tmp_path):
    content = (("x", b"x"), ("checkpoints/step-000010/complete.json", MARKER))
    make(tmp_path / "pack", content=content)
    with pytest.raises(UserError, match=r"made from other inputs \(inputs.data: none -> aaa\)"):
        make(tmp_path / "pack", {**IDENTITY, "parents": {"data": "aaa"}}, fork=True)
    output = Output(tmp_path / "pack", "pack", "pack", {**IDENTITY, "config": {"a": 3}})
    with pytest.raises(UserError, match="is at step-000010 already and the recipe asks for 10 steps"):
        output.open(config={}, parents={}, fork=True, last_step=10)


@pytest.mark.parametrize("words", [{}, {"restart": True}], ids=["plain", "restart"])
def test_a_killed_restart_is_gone_on_with(tmp_path, words):
    make(tmp_path / "pack")
    make(tmp_path / "pack", content=(("half", b"h"),), publish=False, restart=True)
    assert artifact.current(tmp_path / "pack").damage() is None  # the old output serves until the new one is there
    output = make(tmp_path / "pack", content=(("whole", b"w"),), **words)
    assert output.published is None and output.info["resumed"] == 1
    assert set(artifact.current(tmp_path / "pack").manifest["files"]) == {"half", "whole"}


def test_the_word_of_an_earlier_stop_is_taken_back(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/requeue.json").write_text("{}")
    make(tmp_path / "pack")
    assert not (tmp_path / "pack/requeue.json").exists()


READS = """
name: reads
stages:
  clean:
    sources: {web: {path: "web/*.txt"}}
    decontaminate: {sets: {gsm: {path: "sets/*.jsonl", text: "{question}"}}}
    block: {words: [words.txt]}
"""
PACKS = """
name: packs
stages:
  pack: {shards: {web: {path: shards, dtype: uint16}}, inputs: {tokenizer: ./model}}
"""


def test_all_that_stages_read_is_named_when_it_changes(tmp_path, monkeypatch):
    """correctness 46: sources, decontaminate sets, block lists, shards, inputs from outside; nothing is run."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "web/a.txt": "a", "web/b.txt": "b", "sets/q.jsonl": "{}", "words.txt": "spam", "shards/0.npy": "0",
        "model/tokenizer.json": "{}", "model/config.json": "{}", "reads.yaml": READS,
        "packs.yaml": PACKS,
    }.items():  # fmt: skip
        files.write_atomic(tmp_path / name, text)

    def runs(*words) -> dict:
        reads, packs = examine(load("reads.yaml", words)), examine(load("packs.yaml"))
        return {"clean": as_run(reads["clean"], reads), "pack": as_run(packs["pack"], packs)}

    before = runs()
    for name in ("web/c.txt", "web/d.txt", "web/e.txt", "web/f.txt", "sets/q.jsonl", "words.txt", "shards/1.npy"):
        files.write_atomic(tmp_path / name, "changed")
    (tmp_path / "web/a.txt").unlink()
    (tmp_path / "model/config.json").write_text("{ }")
    after = runs("clean.block.min_words=2", "clean.holdout=0.2")
    found = {name: explain(tmp_path / name, before[name], after[name]) for name in before}
    default = Config.model_fields["holdout"].default
    assert found["clean"] == [
        "block.min_words: 3 (default) -> 2",
        f"holdout: {default} (default) -> 0.2",
        "block: 1 file changed (words.txt)",
        "decontaminate.sets.gsm: 1 file changed (q.jsonl)",
        "sources.web: 4 files added (c.txt, d.txt, e.txt and 1 more), 1 file removed (a.txt)",
    ]
    assert found["pack"][:-1] == ["shards.web: 1 file added (1.npy)"]
    assert found["pack"][-1].startswith("inputs.tokenizer: another result of model (")
    assert found["pack"][-1].endswith(": 1 file changed (config.json))")
    back = explain(tmp_path / "clean", after["clean"], before["clean"])
    assert back[1] == f"holdout: 0.2 -> {default} (default)"


# ---- locks of lost nodes (correctness 37) and what killed runs leave (correctness 35) --------------------------------


def elsewhere(folder: Path, age: float, **more) -> None:
    """A lock that a process of another host took, with a heartbeat of some seconds ago."""
    folder.mkdir(exist_ok=True)
    holder = {"host": "elsewhere", "pid": 1, "born": 1, "job": "77", "token": "t", "since": "then", "restarts": 0}
    files.write_json(folder / "lock.json", holder | more)
    at = time.time() - age
    os.utime(folder / "lock.json", (at, at))


def squeue(folder: Path, monkeypatch, body: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/squeue").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("age", [1, 60])
def test_a_requeued_job_takes_over_from_its_lost_node(tmp_path, monkeypatch, capsys, age):
    """correctness 37: the heartbeat is younger than two minutes, and the same job was started again."""
    monkeypatch.setattr(lock, "ENDED_AFTER_SECONDS", 3)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elsewhere(tmp_path, age)
    held = Lock(tmp_path)
    held.acquire()
    assert lock.lock_holder(tmp_path)["pid"] == os.getpid() and lock.lock_holder(tmp_path)["restarts"] == 1
    assert ("waiting for process 1 on elsewhere, job 77" in capsys.readouterr().out) == (age == 1)
    held.release()


@pytest.mark.parametrize(
    "answer",
    ["true", "echo COMPLETED", "echo PENDING", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"],
)
def test_a_job_that_slurm_has_ended_is_taken_over(tmp_path, monkeypatch, answer):
    """correctness 37: by another job, or from a login node."""
    monkeypatch.setattr(lock, "ENDED_AFTER_SECONDS", 2)
    squeue(tmp_path, monkeypatch, answer)
    elsewhere(tmp_path / "pack", 1)
    held = Lock(tmp_path / "pack")
    held.acquire()
    held.release()


@pytest.mark.parametrize("answer", ["echo RUNNING", "echo 'cannot contact slurm controller' >&2; exit 1"])
def test_a_job_that_runs_or_cannot_be_asked_for_is_not_taken_over(tmp_path, monkeypatch, answer):
    squeue(tmp_path, monkeypatch, answer)
    elsewhere(tmp_path / "pack", 30)
    with pytest.raises(UserError, match="process 1 on elsewhere, job 77"):
        Lock(tmp_path / "pack").acquire()


def test_a_step_of_the_same_job_waits_until_the_one_before_is_silent_or_lives(tmp_path, monkeypatch):
    """correctness 37: the node was lost and the job kept its others (--no-kill)."""
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 4)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    elsewhere(tmp_path, 1)
    begun = time.time()
    held = Lock(tmp_path)
    held.acquire()
    assert time.time() - begun > 2
    held.release()

    elsewhere(tmp_path, 0)
    beats = threading.Event()

    def beat():
        while not beats.wait(0.5):
            os.utime(tmp_path / "lock.json")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="another run is writing here"):
            Lock(tmp_path).acquire()
    finally:
        beats.set()
        thread.join()


def test_a_lock_that_a_disk_lost_is_dead_after_a_while(tmp_path):
    (tmp_path / "lock.json").write_text("")
    with pytest.raises(UserError, match="an unknown host"):
        Lock(tmp_path).acquire()
    os.utime(tmp_path / "lock.json", (0, 0))
    held = Lock(tmp_path)
    held.acquire()
    held.release()


def test_leftovers_of_killed_runs_are_removed_and_never_counted(tmp_path):
    """correctness 35: each was left by a kill between two lines."""
    folder = tmp_path / "pack"
    output = make(folder, publish=False)
    dead = subprocess.Popen(["true"])
    dead.wait()
    other = folder / "0123456789ab.partial"
    other.mkdir()
    (other / f".run.json.{dead.pid}.tmp").write_text("{")
    taker = {"host": socket.gethostname(), "pid": dead.pid, "born": 1, "token": "dead", "since": "then"}
    left = [
        folder / ".takeover",
        folder / ".lock.dead",
        folder / f"..lock.half.{dead.pid}.tmp",
        folder / f".requeue.json.{dead.pid}.tmp",
        output.path / f".run.json.{dead.pid}.tmp",
        output.path / "data" / f".one.bin.{dead.pid}.tmp",
        folder / "lock.json",
    ]
    for path in left:
        path.write_text(json.dumps(taker))
    assert not partial_runs.has_work(other) and partial_runs.finished_files(output.path) == 2
    make(folder)
    found = artifact.current(folder)
    assert not [path for path in left if path.exists()] and not other.exists()
    assert not list(found.path.rglob("*.tmp")) and set(found.manifest["files"]) == {"data/one.bin", "two.json"}
    assert not list(folder.glob(".*"))

    # killed between the link and the end, and the stage is not opened for writing again
    (found.path / "work").mkdir()
    (found.path / "work/unit").write_text("x")
    (found.path / f".metrics.jsonl.{dead.pid}.tmp").write_text("x")
    for path in left[:4] + left[-1:]:
        path.write_text(json.dumps(taker))
    tidy(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["current", found.path.name]
    assert sorted(path.name for path in found.path.iterdir()) == ["data", "manifest.json", "run.json", "two.json"]


def test_who_takes_over_leaves_no_guard_behind(tmp_path):
    """correctness 35: `.takeover` is there only while somebody takes over, and two never hold it at once."""
    inside, most = [], []

    def take():
        for _ in range(30):
            with lock._one_at_a_time(tmp_path / ".takeover"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 120 and not list(tmp_path.iterdir())
