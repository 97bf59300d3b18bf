"""Full-width letters and signs."""

from pipeline.data.cleaning.text_repair import Repair, repair_text


def test_full_width():
    assert repair_text("ＡＢＣ１２３，ｏｋ！", Repair(full_width="letters")) == ("ABC123，ok！", ["full_width"])
    assert repair_text("ＡＢＣ１２３，\u3000！", Repair(full_width="all"))[0] == "ABC123, !"
    assert repair_text("abc，", Repair(full_width="letters")) == ("abc，", [])
