"""Matching names: one visible rule, and an error that lists both sides where it does not hold."""

import itertools

import pytest

from tva import MismatchError
from tva.checkpoints import NameFilter, map_names, match_names
from tva.checkpoints.names import WRAPPERS

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
    advice = (
        r"all of the base's 3 are there under 'model.', and 1 of 4 are not .*'head.w'. .* exclude=\['\^head\[.\]'\]"
    )
    with pytest.raises(MismatchError, match=advice):
        match_names([*("model." + name for name in BASE), "head.w"], BASE)


@pytest.mark.parametrize("own", [*WRAPPERS, "model.encoder."])
def test_a_wrapper_is_stripped_or_added_whatever_the_names_begin_with(own):
    names = [own + name for name in BASE]
    for outside, inside in itertools.product(["", *WRAPPERS], repeat=2):
        wrapped = [outside + inside + name for name in names]
        assert match_names(wrapped, names).names == dict(zip(names, wrapped, strict=True))
        assert match_names(names, wrapped).names == dict(zip(wrapped, names, strict=True))


def test_two_ways_to_one_mapping_are_one():
    names = [f"model.{name}" for name in BASE]
    assert match_names([f"model.{name}" for name in names], names).text == "stripped 'model.' from 3 of 3 names"
    assert match_names(names, [f"net.{name}" for name in names]).text == "added 'net.' to 3 of 3 names"


def copies(tensors):
    """Find equal values in place of equal tensors."""
    return lambda name, others: next((other for other in others if tensors[other] == tensors[name]), None)


def test_a_tied_tensor_may_be_stored_under_one_name_or_both():
    base = {"model.embed": 1, "model.w": 2, "head": 1}
    match = match_names(["net.model.embed", "net.model.w"], base, copies=(copies({}), copies(base)))
    assert match.names == {"model.embed": "net.model.embed", "model.w": "net.model.w", "head": "net.model.embed"}
    assert "took 'net.model.embed' for 'head' too, which is a copy of 'model.embed' in the base" in match.text
    both = {"model.embed": 5, "model.w": 2, "head": 5}
    match = match_names(both, ["model.embed", "model.w"], copies=(copies(both), copies({})))
    assert match.names == {"model.embed": "model.embed", "model.w": "model.w"}
    assert "left out 'head', a copy of a tied tensor that the base holds once" in match.text
    both["head"] = 6  # another tensor: it may not be left out
    with pytest.raises(MismatchError, match=r"1 of 3 names are not the base's: 'head'.*exclude=\['\^head\$'\]"):
        match_names(both, ["model.embed", "model.w"], copies=(copies(both), copies({})))


def test_names_are_left_out_on_both_sides_and_counted():
    only = NameFilter(exclude=[r"^head[.]", "inv_freq"])
    assert only.kept(["a.w", "head.w", "a.inv_freq"]) == ["a.w"]
    assert only.note(["a.w", "head.w"], "") == ["left out 1 of 2 names by exclude: 'head.w'"]
    only.check_used()
    assert NameFilter(include=["^a", "^b"], exclude=["b$"]).kept(["a.w", "b.w", "b.b", "c"]) == ["a.w", "b.w"]
    assert NameFilter().kept(["x"]) == ["x"]
    assert NameFilter(exclude="b").options == {"exclude": ["b"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["a", "q"]}, "exclude holds 'q', which matches no name of the base or a vector"),
        ({"include": ["a", "q"]}, "include holds 'q', which matches no name of the base or a vector"),
        ({"exclude": ["("]}, r"exclude holds '\(', which is not a regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(options, message):
    def use():
        only = NameFilter(**options)
        only.kept(BASE)
        only.check_used()

    with pytest.raises(ValueError, match=message):
        use()


def test_different_modules_are_never_exchanged_for_one_another():
    with pytest.raises(MismatchError, match="No single prefix makes the names match"):
        match_names(["layer1.w", "layer1.b"], ["layer2.w", "layer2.b"])
    with pytest.raises(MismatchError, match="No single prefix makes the names match"):
        match_names(["model.a.w", "a.b", "c.w"], BASE)


def test_a_subset_may_be_anywhere_but_in_one_place():
    assert match_names(["c.w"], BASE, subset=True).text == "1 of 1 names match as they are"
    match = match_names(["q.w", "k.w"], ["x.y.q.w", "x.y.k.w", "x.z.q.w"], subset=True)
    assert match.names == {"x.y.q.w": "q.w", "x.y.k.w": "k.w"}
    with pytest.raises(MismatchError, match=r"in more than one way: add 'x.y.'; add 'x.z.'. Choose"):
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
        (["(=x"], r"holds '\(', which is not a regular expression"),
        ([r"(a)=\2"], r"replaces '\(a\)' by '\\\\2', which does not work"),
        (["a|c=x"], r"'a.w' and 'c.w' would both be called 'x.w'"),
        ("a=b", r"must be a list of 'regex=replacement' or a mapping, not one string: \['a=b'\]"),
    ],
)
def test_a_key_map_that_cannot_be_meant_is_refused(key_map, message):
    with pytest.raises(ValueError, match=message):
        match_names(BASE, BASE, key_map)
