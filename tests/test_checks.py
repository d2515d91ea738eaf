"""The exercise checks accept the solution and reject every wrong answer."""

import re
from importlib import import_module

import pytest
import torch
from chapter import all_chapters

from pgcore.lab.checks import CheckFailed, check, checks_of, require_close

ANSWERS = {
    chapter.number: import_module(f"tests.wrong_answers.chapter_{chapter.number}")
    for chapter in all_chapters()
}
RIGHT = [item for answers in ANSWERS.values() for item in answers.RIGHT.items()]
WRONG = [
    (exercise_id, answer)
    for answers in ANSWERS.values()
    for exercise_id, wrong in answers.WRONG.items()
    for answer in wrong
]


def name_of(value) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", repr(value))


@pytest.mark.parametrize(("exercise_id", "answer"), RIGHT, ids=name_of)
def test_the_right_answer_passes(exercise_id, answer, as_user, capsys):
    check(exercise_id, answer)
    assert capsys.readouterr().out.count("✓") == len(checks_of(exercise_id))


@pytest.mark.parametrize(("exercise_id", "answer"), WRONG, ids=name_of)
def test_a_wrong_answer_is_rejected(exercise_id, answer, as_user):
    with pytest.raises(CheckFailed):
        check(exercise_id, answer)


def test_every_exercise_has_a_check_and_wrong_answers():
    for chapter in all_chapters():
        text = "\n".join(cell.source for cell in chapter.notebook.cells)
        exercises = set(re.findall(r"^### Exercise (\S+)", text, flags=re.M))
        answers = ANSWERS[chapter.number]
        assert exercises == set(answers.RIGHT) == set(answers.WRONG)
        assert all(checks_of(exercise_id) for exercise_id in exercises)
        assert all(len(wrong) >= 2 for wrong in answers.WRONG.values())


def test_an_empty_answer_is_told_so():
    def unfinished(*arguments):
        raise NotImplementedError("your code here")

    with pytest.raises(CheckFailed, match="nothing to check yet"):
        check(RIGHT[0][0], unfinished)


def test_an_answer_that_raises_is_told_its_error():
    def broken(*arguments, **options):
        raise KeyError("lost")

    with pytest.raises(CheckFailed, match="your code raised KeyError: 'lost'"):
        check(RIGHT[0][0], broken)


@pytest.mark.parametrize("exercise_id", ["99.1", "02.9", "nonsense", ""])
def test_an_unknown_exercise_is_a_value_error(exercise_id):
    with pytest.raises(ValueError, match="there is no such exercise"):
        check(exercise_id, None)


def test_a_notebook_shows_one_line_instead_of_a_traceback():
    assert CheckFailed("02.1: no")._render_traceback_() == ["✗ 02.1: no"]


ONE_TWO = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, 2.1]), r"at index \[1\] expected 2, got 2.1"),
        (torch.tensor([[1.0, 2.0]]), r"expected shape \(2,\), got \(1, 2\)"),
        (torch.tensor([1.0, float("nan")]), "expected 2, got nan"),
        ([1.0, 2.0], "expected a tensor, got list"),
        (None, "expected a tensor, got NoneType"),
    ],
)
def test_a_check_says_what_differs(actual, message):
    with pytest.raises(CheckFailed, match=message):
        require_close(actual, ONE_TWO)


def test_a_check_accepts_equal_tensors_of_any_kind():
    require_close(ONE_TWO.double().requires_grad_(), ONE_TWO)
    require_close(torch.tensor(float("nan")), torch.tensor(float("nan")))


def test_a_missing_dependency_of_a_check_is_not_a_missing_exercise(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr("pgcore.lab.checks.import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="scipy"):
        checks_of("02.1")
