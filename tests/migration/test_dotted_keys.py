from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import OptionInvalid
from vmm.migration.dotted_keys import parse_dotted_keys


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("main", {"kind": "main"}),
        ("kind=main", {"kind": "main"}),
        ("main,a.b=1,a.c.d=2,", {"kind": "main", "a": {"b": "1", "c": {"d": "2"}}}),
        ("p=a,,b", {"p": "a,b"}),
        ("p=a,,,q=b=c", {"p": "a,", "q": "b=c"}),
        ("p=", {"p": ""}),
        ("a,,b", {"kind": "a,b"}),
    ],
)
def test_keys_and_values(text: str, result: dict[str, object]) -> None:
    assert parse_dotted_keys(text, "kind", "-x") == result


KEY = "is not a key: words of letters, digits, - and _ that begin with a letter, joined by dots"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "'' is not of the form key=value"),
        ("main,more", "'more' is not of the form key=value"),
        ("a=1,,", None),
        ("a=1,,,", None),
        ("a=1,b", "'b' is not of the form key=value"),
        ("a=1,.b=2", f"'.b' {KEY}"),
        ("a=1,b..c=2", f"'b..c' {KEY}"),
        ("=1", f"'' {KEY}"),
        ("0=1", f"'0' {KEY}"),
        ("a=1,a=2", "'a' is not to be given twice"),
        ("a.b=1,a=2", "'a' is not to be given twice"),
        ("a=1,a.b=2", "'a.b' is not possible: 'a' has a value already"),
    ],
)
def test_malformed_text_is_refused_with_the_faulty_part(text: str, fault: str | None) -> None:
    if fault is None:
        assert parse_dotted_keys(text, "kind", "-x") == {"a": "1,"}
        return
    with pytest.raises(OptionInvalid) as caught:
        parse_dotted_keys(text, "kind", "-x")
    assert str(caught.value) == f"-x: {fault}"


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(alphabet="a0.=,-_\u00e9", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        result = parse_dotted_keys(text, "kind", "-x")
    except OptionInvalid:
        return
    assert result


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_-]{0,5}", fullmatch=True),
        st.text(max_size=10).filter(lambda t: "\0" not in t),
        min_size=1,
    )
)
def test_doubling_commas_escapes_every_value(values: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
    # A value that ends in commas is told from the comma after it: pairs are taken from the left.
    assert parse_dotted_keys(f"{text},", "kind", "-x") == values
