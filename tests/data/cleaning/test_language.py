"""Languages that are detected and kept."""

import dataclasses

from pipeline.data.cleaning.language import DETECTED, Language, detect
from pipeline.data.cleaning.outcomes import Document, Outcome
from pipeline.data.cleaning.steps import Steps, clean_batch

EN = (
    "The committee met on Tuesday to decide what should be done with the old bridge. Nobody had crossed it for years,"
    " and the river below had moved. "
)
ZH = "这座桥是一百年前修的，如今已经没有人走了。河水改了道，村里的人也搬到了别的地方，只有老人还记得它原来的样子。"


def judged(texts: list[str], **blocks) -> list[dict]:
    documents = [Document(Outcome("f:1"), text) for text in texts]
    clean_batch(documents, Steps(**blocks))
    return [dataclasses.asdict(document.outcome) for document in documents]


def test_known_languages_are_the_detectors():
    import eldc

    assert sorted(DETECTED) == sorted(eldc.LANGUAGES)


def test_languages_are_named_and_kept():
    french = (
        "L'été dernier, à Orléans, la fête a été très réussie ; les élèves ont chanté et chacun est rentré chez soi"
        " avant la nuit."
    )
    codes, scores = detect([EN, ZH, french, "夫天地者，萬物之逆旅也；光陰者，百代之過客也。", ""])
    assert codes == ["en", "zh", "fr", "zh", "und"] and (scores[:4] > 0.7).all() and scores[4] == 0
    rows = judged([EN, ZH, french], language=Language(keep=["en", "zh"]))
    assert [(row.get("reason"), row["language"], row["kind"]) for row in rows] == [
        (None, "en", 0),
        (None, "zh", 1),
        ("language", "fr", 2),
    ]
    assert judged([EN], language=Language(keep=["en"], min_confidence=0.999))[0]["reason"] == "uncertain_language"
