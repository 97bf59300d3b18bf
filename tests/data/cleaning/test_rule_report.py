"""The report about rules against counts of the outcomes."""

import json
import random

from judged_texts import article, judged

from pipeline.data.cleaning.filters import Filters
from pipeline.data.cleaning.rule_report import RuleReport
from pipeline.data.cleaning.rules import RULE_SETS, Rules, Thresholds
from pipeline.data.cleaning.steps import Steps, reasons

EN = (
    "The committee met on Tuesday to decide what should be done with the old bridge. Nobody had crossed it for years,"
    " and the river below had moved. "
)
ZH = "这座桥是一百年前修的，如今已经没有人走了。河水改了道，村里的人也搬到了别的地方，只有老人还记得它原来的样子。"


def reasons_of(row: dict, rules: Rules, filters: Filters = Filters()) -> list[str]:
    names = [name for name, _ in reasons(Steps(rules=rules, filters=filters))]
    return [name for bit, name in enumerate(names) if row["failed"] >> bit & 1]


def outcome(rows: list[dict]):
    import pyarrow

    kinds = {
        "failed": pyarrow.int64(),
        "kind": pyarrow.int8(),
        "bytes": pyarrow.int64(),
        "statistics": pyarrow.binary(),
    }
    return pyarrow.table(
        {
            key: pyarrow.array([row.get(key) for row in rows], kinds.get(key, pyarrow.string()))
            for key in (
                "place",
                "id",
                "excerpt",
                "bytes",
                "language",
                "kind",
                "statistics",
                "failed",
                "changed",
                "matched",
            )
        }
    )


def test_the_ledger_counts_overlaps_samples_and_what_other_thresholds_would_do():
    rng = random.Random(5)
    texts = [article(rng, base, rng.randrange(1, 12)) for base in (EN, ZH) for _ in range(40)] + [
        "too short",
        EN * 20,
        ZH * 20,
        "Ã©tÃ© " * 9,
    ]
    rules = Rules(use=list(RULE_SETS))
    rows = judged(texts, rules=rules)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row.update(id=f"{number * 7919 % 997:032x}", place=f"f:{number}", bytes=len(text.encode()))
    rows.append({"id": None, "place": "f:x", "status": "bad"})
    reports = []
    for cuts in ([0, 85], [0, 13, 40, 85]):  # whatever the units, and their order
        found = RuleReport(Steps(rules=rules))
        for low, high in reversed(list(zip(cuts, cuts[1:], strict=False))):
            found.add("s", outcome(rows[low:high]))
        reports.append(found.report())
    assert reports[0] == reports[1]
    report = json.loads(json.dumps(reports[0]))
    assert report["documents"] == 84 and report["judged_as"] == {"en": 43, "zh": 41, "other": 0}
    failing = {
        name: [row for row in rows if "failed" in row and name in reasons_of(row, rules)] for name in report["rules"]
    }
    assert report["rejected"] == sum(row["status"] == "filtered" for row in rows)
    for name, entry in report["rules"].items():
        assert entry["documents"] == len(failing[name]) and entry["bytes"] == sum(row["bytes"] for row in failing[name])
        assert entry["alone"] == sum(len(reasons_of(row, rules)) == 1 for row in failing[name])
        assert entry["first"] == sum(row["reason"] == name for row in rows if row.get("reason"))
        assert [sample["id"] for sample in entry["samples"]] == sorted(row["id"] for row in failing[name])[:5]
        for other, number in entry["with"].items():
            assert number == sum(other in reasons_of(row, rules) for row in failing[name])
    # Another threshold, tried: the ledger said what it would do.
    entry = next(
        item for item in report["rules"]["min_sentences"]["thresholds"]["rules.en.min_sentences"] if item[0] == 10
    )
    again = judged(texts, rules=Rules(use=list(RULE_SETS), en=Thresholds(min_sentences=10)))
    english = [row for row in again if row["kind"] == 0]
    assert (
        entry[1]
        == sum("min_sentences" in reasons_of(row, rules) for row in english)
        > report["rules"]["min_sentences"]["first"]
    )
    assert entry[2] == sum(row["status"] == "filtered" for row in english)
