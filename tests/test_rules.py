"""Rules on parameter paths: whole paths, first match, no silent typos."""

import pytest
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError
from cap_pretrain.rules import apply_rules, flatten

TREE = {"encoder": {"kernel": 1, "bias": 2}, "head": [{"kernel": 3}, {"kernel": 4}]}


def test_paths_name_the_place_in_the_tree():
    assert flatten(TREE) == {
        "encoder/bias": 2,
        "encoder/kernel": 1,
        "head/0/kernel": 3,
        "head/1/kernel": 4,
    }


def test_the_first_match_wins_and_others_get_the_default():
    rules = (("encoder/kernel", "a"), ("head/1/.*", "b"), (".*kernel", "c"))
    assert apply_rules(rules, TREE, default="d", field="f") == {
        "encoder": {"kernel": "a", "bias": "d"},
        "head": [{"kernel": "c"}, {"kernel": "b"}],
    }


def test_the_whole_path_must_match():
    with pytest.raises(UserError, match="f: 'kernel' matches no parameter. .*'encoder/bias'"):
        apply_rules((("kernel", 1),), TREE, default=0, field="f")
    assert apply_rules((("kernel", 1),), TREE, default=0, field="f", strict=False)["head"] == [
        {"kernel": 0},
        {"kernel": 0},
    ]


def test_a_rule_that_matches_but_never_wins_is_allowed():
    apply_rules(((".*", 1), ("encoder/bias", 2)), TREE, default=0, field="f")


def test_an_invalid_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"f: '\(' is not a regular expression"):
        apply_rules((("(", 1),), TREE, default=0, field="f", strict=False)


def test_rules_may_come_from_a_config():
    c = ConfigDict({"rules": ((".*/bias", 0.5),)})
    assert apply_rules(c.rules, TREE, default=1.0, field="f")["encoder"]["bias"] == 0.5
