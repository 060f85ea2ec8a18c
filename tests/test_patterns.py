"""Regular expressions of users and files."""

import re
import time

import pytest

from tva.patterns import Pattern

FOREVER = ["(a|a|aa)+b", "(a+)+$", "(.*)*(.*)*y", "(a|a)*b", "(.*a){25}b", "(?:a?){50}a{50}b", ".*.*.*.*.*.*.*="]
FOREVER += [r"(a)(\1*)*b", "(?=(a+)+b)", "(?x) (a +)+ b", "(?i)(A+)+b", "(a{0,40}){0,40}b", "((((a?)*)*)*)*b"]
ORDINARY = [r"^encoder\.", r".*attn.*(q|k|v)_proj.*", r"layers\.(\d+)\..*\.weight$", r"(?:foo\.)*bar", r"^(?!head)"]
ORDINARY += [r"[^.]*norm[^.]*\.(weight|bias)$", r"(?:model\.)?(?:enc|dec)\.\d+", r"(?i)HEAD", r"\.(\d|1[0-9])\."]
ORDINARY += ["a|b|.*mlp.*"]


@pytest.mark.parametrize("pattern", FOREVER)
def test_an_expression_that_could_take_forever_is_refused_before_it_is_matched(pattern):
    with pytest.raises(ValueError, match="exclude holds .* could take forever to match a name of 60 characters"):
        Pattern(pattern, "exclude").search("a" * 60)


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_expressions_match_as_ever(pattern):
    names = ["encoder.layers.3.attn.q_proj.weight", "model.enc.1.norm1.bias", "foo.foo.bar", "head.w", "a"]
    made, plain = Pattern(pattern, "include"), re.compile(pattern)
    for name in names:
        assert bool(made.search(name)) == bool(plain.search(name))
        assert made.subn("x", name) == plain.subn("x", name)


def test_what_is_accepted_ends_soon_also_where_nothing_matches():
    started = time.process_time()  # not what other processes take
    for pattern in (".*.*.*=", ".*a.*a.*b", "(a|b|c)?(a|b)?.*=", "a*a*a*b"):
        assert not Pattern(pattern, "include").search("a" * 120)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a>", "(?R)", "\\"])
def test_what_is_not_an_expression_is_named_with_its_option(pattern):
    with pytest.raises(ValueError, match="key_map holds .*, which is not a regular expression"):
        Pattern(pattern, "key_map")
