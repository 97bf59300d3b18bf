"""Intermediate files that are lost or damaged, full disks, and kills."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from cleaned import published
from harness import files_of, stage, succeed
from paths import ROOT
from word_corpus import words, write


@pytest.fixture(scope="module")
def families() -> dict[str, list[dict]]:
    """Twelve texts in both sources: the same, a longer near duplicate, and one that is alone; with addresses."""
    rng = random.Random(1)
    a, b = [], []
    for i in range(12):
        text = words(rng, 120)
        a.append({"text": " ".join(text), "url": f"https://www.Example.org/{i}/"})
        b.append({"text": " ".join([*text, *words(rng, 6)]), "url": f"http://example.org/other{i}"})
        b.append({"text": " ".join(text) + " ", "url": "x"})
        a.append({"text": " ".join(words(rng, 80)), "url": f"example.org/{i}#part"})
    return {"a": a, "b": b}


@pytest.fixture(scope="module")
def whole(families, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    succeed("clean", write(folder, families, unit_bytes=4000), cwd=folder)
    return folder


@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "foreign"])
def test_a_lost_or_damaged_unit_is_made_again(families, whole, tmp_path, harm):
    """After a kill behind the last unit; never read as an empty one."""
    path = write(tmp_path / "harmed", families, unit_bytes=4000)
    assert stage("clean", path, "clean.max_bad=1", cwd=path.parent, fault="publish:1")[0] == -9
    units = sorted(path.parent.glob("runs/t/clean/*/work/units-*/*/*.parquet"))
    assert len(units) > 4
    for shard in path.parent.glob("runs/t/clean/*/train/*"):
        shard.unlink()
    raw = units[2].read_bytes()
    if harm == "missing":
        units[2].unlink()
    elif harm == "foreign":
        units[2].write_bytes(units[3].read_bytes())
    else:
        units[2].write_bytes(
            raw[: len(raw) // 2] if harm == "cut" else raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:]
        )
    text = succeed("clean", path, cwd=path.parent)
    assert "it is recomputed" in text and units[2].name in text
    assert files_of(published(path.parent)) == files_of(published(whole))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_work_goes_on(tmp_path):
    """The whole stage on a file system of half a megabyte, which is then made larger: every unit that was done is
    still there and not made again."""
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here without being root")
    rng = random.Random(5)
    rows = {"a": [{"text": " ".join(words(rng, 300))} for _ in range(240)]}  # half a megabyte
    whole = tmp_path / "whole"
    succeed("clean", write(whole, rows), cwd=whole)
    path = write(tmp_path / "full", rows, workers=2)
    (path.parent / "runs").mkdir()
    script = f"""
        mount -t tmpfs -o size=500k none runs
        run() {{ {sys.executable} {ROOT}/pipeline/clean.py {path.name}; }}
        run 2> said; echo $? > code
        stat -c '%n %Y %i' runs/t/clean/*/work/units-*/a/*.parquet > before
        mount -o remount,size=20m runs
        ALMA_FAULT=publish:1 run; stat -c '%n %Y %i' runs/t/clean/*/work/units-*/a/*.parquet > after
        run && cp -rL runs/t/clean/current published
    """
    answer = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=path.parent, capture_output=True, text=True, timeout=200
    )
    assert answer.returncode == 0, answer.stderr
    said = (path.parent / "said").read_text()
    assert (
        (path.parent / "code").read_text() == "2\n"
        and "No space left on device" in said
        and "run the same command again" in said
        and "Traceback" not in said
    )
    before, after = (set((path.parent / name).read_text().splitlines()) for name in ("before", "after"))
    assert len(before) >= 5 and before < after
    assert files_of(path.parent / "published") == files_of(published(whole))


def test_a_kill_loses_the_units_in_flight_and_no_more(families, tmp_path):
    """What was done before a kill has the same inode afterwards; with one worker one unit is in flight."""
    path = write(tmp_path, families, unit_bytes=4000)

    def done() -> dict[str, int]:
        return {str(file): file.stat().st_ino for file in tmp_path.glob("runs/t/clean/*/work/units-*/*/*.parquet")}

    assert stage("clean", path, cwd=tmp_path, fault="work:4")[0] == -9
    before = done()
    assert stage("clean", path, cwd=tmp_path, fault="publish:1")[0] == -9
    after = done()
    assert len(before) == 4 < len(after) and all(after[name] == inode for name, inode in before.items())
