"""Matching names: one visible rule, and an error that lists both sides where it does not hold."""

import pytest

from tva import MismatchError
from tva.checkpoints import map_names, match_names

BASE = ["a.w", "a.b", "c.w"]


@pytest.mark.parametrize(
    ("names", "base", "text"),
    [
        (BASE, BASE, "3 of 3 names match as they are"),
        (["model." + name for name in BASE], BASE, "stripped 'model.' from 3 of 3 names"),
        (["any.thing." + name for name in BASE], BASE, "stripped 'any.thing.' from 3 of 3 names"),
        (BASE, ["encoder." + name for name in BASE], "added 'encoder.' to 3 of 3 names"),
        (["net." + n for n in BASE], ["model." + n for n in BASE], "exchanged 'net.' for 'model.' in 3 of 3 names"),
        (["module.x.w", "module.x.b"], ["x.w", "x.b"], "stripped 'module.' from 2 of 2 names"),
        (["x.x.w", "x.x.b"], ["x.w", "x.b"], "stripped 'x.' from 2 of 2 names"),
    ],
)
def test_one_prefix_for_all_names_is_found_and_said(names, base, text):
    match = match_names(reversed(names), base)
    assert match.text == str(match) == text
    assert match.names == dict(zip(base, names, strict=True))
    assert list(match.names) == base


def test_names_that_do_not_match_are_listed_on_both_sides():
    with pytest.raises(MismatchError, match=r"1 of 3 names are not the base's: 'd.w'; 1 of the base's 3 .*: 'c.w'"):
        match_names(["a.w", "a.b", "d.w"], BASE)
    with pytest.raises(MismatchError, match=r"1 of the base's 3 names are not there: 'c.w'"):
        match_names(["a.w", "a.b"], BASE)
    with pytest.raises(MismatchError, match="There are 0 names to match to 3"):
        match_names([], BASE)
    with pytest.raises(MismatchError, match=r"All of the base's are there under 'model.': pass prefix='model.'"):
        match_names([*("model." + name for name in BASE), "head.w"], BASE)


def test_different_modules_are_never_exchanged_for_one_another():
    with pytest.raises(MismatchError, match="No one prefix makes the names match"):
        match_names(["layer1.w", "layer1.b"], ["layer2.w", "layer2.b"])
    with pytest.raises(MismatchError, match="No one prefix makes the names match"):
        match_names(["model.a.w", "a.b", "c.w"], BASE)


def test_a_subset_may_be_anywhere_but_in_one_place():
    assert match_names(["c.w"], BASE, subset=True).text == "1 of 1 names match as they are"
    match = match_names(["q.w", "k.w"], ["x.y.q.w", "x.y.k.w", "x.z.q.w"], subset=True)
    assert match.names == {"x.y.q.w": "q.w", "x.y.k.w": "k.w"}
    with pytest.raises(MismatchError, match=r"in more than one way: \"add 'x.y.'\", \"add 'x.z.'\""):
        match_names(["q.w"], ["x.y.q.w", "x.z.q.w"], subset=True)


def test_a_key_map_comes_first():
    match = match_names(["visual.0.w", "visual.1.w"], ["m.blocks.0.w", "m.blocks.1.w"], [r"^visual\.(\d)=blocks.\1"])
    assert match.text == "key_map renamed 2 of 2 names; added 'm.' to 2 of 2 names"
    assert match.names["m.blocks.1.w"] == "visual.1.w"
    assert map_names(["a(?=b)", "xy"], {"x": "z"}) == {"a(?=b)": "a(?=b)", "zy": "xy"}
    assert map_names(["ab"], ["a(?=b)=c", "c=d"]) == {"db": "ab"}


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        (["q=p"], r"holds 'q', which matches none of the names 'a.w', 'a.b', 'c.w'"),
        (["("], r"holds '\('; write regex=replacement"),
        (["(=x"], r"holds '\(', which is no regular expression"),
        ([r"(a)=\2"], r"replaces '\(a\)' by '\\\\2', which does not work"),
        (["a|c=x"], r"'a.w' and 'c.w' would both be called 'x.w'"),
        ("a=b", r"must be a list of 'regex=replacement' or a mapping, not one string: \['a=b'\]"),
    ],
)
def test_a_key_map_that_cannot_be_meant_is_refused(key_map, message):
    with pytest.raises(ValueError, match=message):
        match_names(BASE, BASE, key_map)
