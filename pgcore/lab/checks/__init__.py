"""Exercise checks: ``check("02.1", your_function)`` says what holds and what does not.

Each chapter has a file here. A check compares your answer with an independent
oracle, tries a property on random cases, and is known to reject wrong answers
(``tests/wrong_answers`` has them).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Check = Callable[[Any], None]

_REGISTRY: dict[str, list[Check]] = {}


class CheckFailed(AssertionError):
    """What your answer did, what was expected, and a hint. Notebooks show one line."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


def exercise(exercise_id: str) -> Callable[[Check], Check]:
    """Register a function as one check of an exercise; its docstring is the claim."""

    def register(function: Check) -> Check:
        _REGISTRY.setdefault(exercise_id, []).append(function)
        return function

    return register


def checks_of(exercise_id: str) -> list[Check]:
    """The checks of an exercise.

    Raises ValueError if there is none of that name.
    """
    module = f"pgcore.lab.checks.chapter_{exercise_id.split('.')[0]}"
    try:
        import_module(module)
        return _REGISTRY[exercise_id]
    except (ModuleNotFoundError, KeyError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise  # the exercise exists, and something that its check needs does not
        raise ValueError(
            f'check("{exercise_id}", ...): there is no such exercise; ids look like '
            '"02.1", chapter and number, as in the headings'
        ) from None


def check(exercise_id: str, answer: Any) -> None:
    """Try every check of one exercise on your answer.

    Raises CheckFailed at the first claim that does not hold.
    """
    for number, one_check in enumerate(checks_of(exercise_id), start=1):
        claim = (one_check.__doc__ or one_check.__name__).strip().rstrip(".")
        try:
            one_check(answer)
        except NotImplementedError as error:
            raise CheckFailed(
                f"{exercise_id}: nothing to check yet ({error})"
            ) from None
        except CheckFailed as error:
            raise CheckFailed(
                f"{exercise_id}, check {number}: {claim}. {error}"
            ) from None
        except Exception as error:
            reason = f"your code raised {type(error).__name__}: {error}"
            raise CheckFailed(
                f"{exercise_id}, check {number}: {claim}. {reason}"
            ) from error
        print(f"✓ {exercise_id}: {claim}")


def require(condition: bool | Tensor, message: str) -> None:
    """Fail the check with a message unless the condition holds."""
    if not bool(condition):
        raise CheckFailed(message)


def require_close(
    actual: Any,
    expected: Tensor,
    hint: str = "",
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Fail unless ``actual`` is a tensor equal to ``expected`` (NaN equals NaN)."""
    require(
        isinstance(actual, Tensor), f"expected a tensor, got {type(actual).__name__}"
    )
    require(
        actual.shape == expected.shape,
        f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}. {hint}",
    )
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    close = torch.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not close.all():
        at = tuple(int(i) for i in (~close).nonzero()[0])
        where = f"at index {list(at)} " if at else ""
        raise CheckFailed(
            f"{where}expected {expected[at].item():.6g}, "
            f"got {actual[at].item():.6g}. {hint}".strip()
        )
