"""VQA accuracy, by cases of the challenge's rule."""

import pytest

from cap_pretrain.evals.metrics.answer_accuracy import accuracy, normalized


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  a Red\tcar\n", "red car"),
        ("an apple and the pear", "apple and pear"),
        ("two", "2"),
        ("None", "0"),
        ("ten eleven", "10 eleven"),
        ("yes.", "yes"),
        ("3.5 m.", "3.5 m"),
        (".5", ".5"),
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("salt , pepper", "salt pepper"),  # next to a space, it is removed
        ("salt- pepper-mill", "salt peppermill"),  # and so is every other mark of the same kind
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("what?!", "what"),
        ("5:30", "5:30"),
        ("man's", "man's"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("ows'at", "ows'at"),
        ("ow's'at", "'ow's'at"),
        ("its", "its"),
        ("5 oclock", "5 o'clock"),
        ("", ""),
    ],
)
def test_answers_are_compared_in_one_form(answer, expected):
    assert normalized(answer) == expected


@pytest.mark.parametrize(
    ("matches", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_ten_people_are_averaged_with_each_left_out(matches, expected):
    # Published: one match of ten is 0.3, two 0.6, three 0.9, four or more 1.
    references = ["A dog."] * matches + ["cat"] * (10 - matches)
    assert accuracy("dog", references) == pytest.approx(expected)


def test_one_reference_is_compared_as_it_is():
    assert accuracy(" True ", ["true"]) == 1
    assert accuracy("T-Shirt", ["t-shirt"]) == 1
    assert accuracy("t shirt", ["t-shirt"]) == 0
    assert accuracy("the dog", ["dog"]) == 0


def test_few_people_cannot_make_an_answer_right():
    assert accuracy("dog", ["dog", "dog"]) == pytest.approx(1 / 3)
    assert accuracy("dog", ["dog", "cat", "dog"]) == pytest.approx((1 + 2 + 1) / 9)
