"""Tables of Arrow: only the columns that are needed are read, and values that Python cannot hold cost nobody else
anything."""

import datetime
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from harness import stage, succeed

from pipeline.core.errors import UserError
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, read
from pipeline.data.sources.sources import Source, needed_fields

NUMBER = 6
DAY = 86_400
YEAR_0 = -62_167_219_200  # seconds, of 0000-01-01
YEAR_12000 = 316_516_204_800


def _columns() -> dict[str, pyarrow.Array]:
    """Types whose values Python cannot hold, or not all of them."""
    seconds = [0, None, YEAR_0, YEAR_12000, DAY, -1]
    nanoseconds = [0, None, 1, 2**62, -(2**62), DAY * 10**9 + 7]
    ns = pyarrow.array(nanoseconds, pyarrow.timestamp("ns"))
    twice = pyarrow.StructArray.from_arrays([pyarrow.array(range(NUMBER))] * 2, ["a", "a"])
    days = pyarrow.array([0, None, YEAR_0 // DAY, YEAR_12000 // DAY, 2**31 - 1, -(2**31)], pyarrow.date32())
    return {
        "ns": ns,
        "seconds": pyarrow.array(seconds, pyarrow.timestamp("s")),
        "zone": pyarrow.array([0] * NUMBER, pyarrow.timestamp("us", "Mars/Olympus_Mons")),
        "known_zone": pyarrow.array(seconds, pyarrow.timestamp("s", "Asia/Shanghai")),
        "day": days,
        "day64": days.cast(pyarrow.date64()),
        "duration": pyarrow.array([0, None, 2**62, -(2**62), 5, 6], pyarrow.duration("s")),
        "duration_ns": pyarrow.array(nanoseconds, pyarrow.duration("ns")),
        "time": pyarrow.array([0, None, 1, DAY * 10**9 - 1, 1001, 5], pyarrow.time64("ns")),
        "nested": pyarrow.StructArray.from_arrays([pyarrow.array(["u"] * NUMBER), ns, days], ["url", "at", "day"]),
        "list": pyarrow.array([[value] for value in seconds], pyarrow.list_(pyarrow.timestamp("s"))),
        "map": pyarrow.array([[("k", value)] for value in seconds], pyarrow.map_("string", pyarrow.timestamp("s"))),
        "dictionary": ns.dictionary_encode(),
        "twice": twice,
    }


def write(path, columns: dict, **options) -> str:
    text = {"text": [f"line {i} 第{i}行" for i in range(NUMBER)]}
    pyarrow.parquet.write_table(pyarrow.table(text | columns), path, **options)
    return str(path)


@pytest.mark.parametrize("name", sorted(_columns()))
def test_a_column_that_nobody_asked_for_costs_nothing(tmp_path, name):
    """correctness 25: alone, with `part` (which reads all), nested beside what is asked for, and asked for itself."""
    column = _columns()[name]
    path = write(tmp_path / "a.parquet", {name: column})
    source = Source(path=path)
    found = list(read(source, "x", needed=needed_fields(source)))
    assert [item.fields for item in found] == [{"text": f"line {i} 第{i}行"} for i in range(NUMBER)]
    for needed in (None, needed_fields(source)):
        whole = list(read(Source(path=path, part=(0.0, 0.99999)), "x", needed=needed))
        assert all(isinstance(item, Record) and list(item.fields) == ["text", name] for item in whole), whole
        assert len({item.id for item in whole}) == NUMBER
    asking = Source(path=path, text="{text} {" + name + "}")
    for item in read(asking, "x", needed=needed_fields(asking)):
        assert isinstance(item, (Record, Bad))
        if isinstance(item, Bad):
            assert item.reason == "value that cannot be read" and item.raw.startswith(f"{name}: "), item
            assert item.place.startswith("a.parquet:"), item


def test_a_value_that_cannot_be_read_is_a_bad_record_where_it_is_asked_for(tmp_path):
    """correctness 25"""
    columns = _columns()
    path = write(tmp_path / "a.parquet", {key: columns[key] for key in ("seconds", "nested", "zone")})
    source = Source(path=path, where={"seconds": [datetime.datetime(1970, 1, 1), datetime.datetime(1970, 1, 2)]})
    found = list(read(source, "x", needed=needed_fields(source)))
    assert [item.place for item in found] == [f"a.parquet:{row}" for row in (1, 3, 4, 5)]
    assert [item.reason for item in found if isinstance(item, Bad)] == ["value that cannot be read"] * 2
    assert f"seconds: timestamp[ms] {YEAR_0}000 (" in found[1].raw
    source = Source(path=path, text="nested.url")  # its neighbours in the struct do not matter
    assert [item.fields["nested"]["url"] for item in read(source, "x", needed=needed_fields(source))] == ["u"] * NUMBER
    source = Source(path=path, text="zone")
    assert {item.reason for item in read(source, "x", needed=needed_fields(source))} == {"value that cannot be read"}


def test_records_are_the_same_with_and_without_pandas(tmp_path):
    """correctness 25: what is read does not depend on a package that happens to be installed."""
    columns = {key: value for key, value in _columns().items() if key != "twice"}
    path = write(tmp_path / "a.parquet", columns)
    program = (
        "import sys\n{}\nfrom pipeline.data.sources.records import read\nfrom pipeline.data.sources.sources import Source\n"
        f"for item in read(Source(path={path!r}), 'x'): print(item.place, item.id, item.fields)\n"
        "print('pandas' in sys.modules)"
    )
    without = "sys.modules['pandas'] = None"
    given = [
        subprocess.run([sys.executable, "-c", program.format(line)], capture_output=True, text=True, check=True).stdout
        for line in ("import pandas", without)
    ]
    assert given[0] == given[1] and given[0].count("a.parquet:") == NUMBER


def test_ids_of_values_that_python_holds_are_those_of_the_same_records_as_json(tmp_path):
    at = datetime.datetime(2024, 2, 29, 12, 30, 1)
    path = write(tmp_path / "a.parquet", {"at": pyarrow.array([at] * NUMBER, pyarrow.timestamp("ns"))})
    rows = [{"text": f"line {i} 第{i}行", "at": str(at)} for i in range(NUMBER)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [[item.id for item in read(Source(path=p), "x")] for p in (path, str(tmp_path / "a.jsonl"))]
    assert ids[0] == ids[1]


TEXTS = [
    f"Document {i} is about the number {i}, which is written here in words and figures. It is long enough to stay."
    for i in range(300)
]


def test_cleaning_reads_tables_with_odd_columns(tmp_path):
    """correctness 13, 25: the stage, in worker processes; files with a repeated column are named in a warning."""
    odd = {key: value.take(pyarrow.array([i % NUMBER for i in range(300)])) for key, value in _columns().items()}
    table = pyarrow.table({"text": TEXTS, "url": [f"http://a.b/{i}" for i in range(300)]} | odd)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([table["text"]] * 2, names=["text"] * 2), tmp_path / "b.parquet"
    )
    keys = {"holdout": 0.1, "dedup": {"near": None, "url": "url"}, "unit_bytes": 4096, "workers": 2}
    stages = {"clean": {"sources": {"a": {"path": f"{tmp_path}/*.parquet"}}, **keys}}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "t", "stages": stages, "output": str(tmp_path / "runs")}))
    said = succeed("clean", "r.yaml", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())
    assert report["total"]["documents_out"] == 300 and report["sources"]["a"]["bad"] == {REPEATED: 1}
    assert "1 file has two columns of one name" in said
    code, said = stage("clean", "r.yaml", "clean.sources.a.text=zone", "output=other", cwd=tmp_path)
    assert code == 2 and "Traceback" not in said and "a.parquet:1: value that cannot be read" in said, said


def test_evaluation_sets_and_examples_refuse_a_repeated_column(tmp_path):
    """correctness 13"""
    from pipeline.data.cleaning.perplexity_model import Perplexity, train
    from pipeline.data.dedup.decontaminate import Decontaminate, build_runs

    table = pyarrow.Table.from_arrays([pyarrow.array(TEXTS)] * 2, names=["text"] * 2)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = Source(path=str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="decontaminate.sets.a: a.parquet:1: two columns of one name"):
        build_runs(Decontaminate(sets={"a": source}))
    with pytest.raises(UserError, match="examples.a: a.parquet:1: two columns of one name"):
        train({"a": source}, Perplexity(like=["a"]), tmp_path)
