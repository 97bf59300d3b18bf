"""Templates of record fields."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.data.sources.sources import Source
from pipeline.data.sources.templates import MissingField, render


def test_templates():
    fields = {"a": 1.5, "b": {"c": "é"}, "d.e": "dotted", "list": ["p", "q"], "none": None, "{": "never"}
    assert render("{a}-{b.c}-{d.e}-{{x}}-{list}-{list.1}", fields) == "1.5-é-dotted-{x}-p\nq-q"
    with pytest.raises(MissingField, match=r"^f:3: no field 'bb'.*the record has a, b"):
        render("{bb}", fields, "f:3")
    with pytest.raises(MissingField, match="'none' holds nothing"):
        render("{none}", fields)
    assert render("{n}", {"n": 10**400}) == "1" + 400 * "0"  # no float can hold it
    for number in ("nan", "inf", "-inf"):
        with pytest.raises(MissingField, match=f"'n' holds nothing .{number}."):
            render("{n}", {"n": float(number)})
    for broken in ("{a", "a}", "{}", "{a{b}}"):
        with pytest.raises(UserError, match="lone"):
            render(broken, fields)
    with pytest.raises(MissingField):
        render("{a.__class__}", fields)


@given(st.text(), st.text())
def test_templates_put_values_in_as_they_are(value, around):
    assert render(around.replace("{", "{{").replace("}", "}}") + "{v}", {"v": value}) == around + value


def test_a_broken_template_is_found_before_anything_is_read():
    with pytest.raises(ValueError, match="has a lone '{'"):
        Source(path="a.jsonl", text="{body")
    for constant in ("", " ", "{{x}} constant"):
        with pytest.raises(ValueError, match="text\n.*names no field"):
            Source(path="a.jsonl", text=constant)
