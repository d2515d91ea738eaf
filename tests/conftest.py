"""What every test file may use."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

settings.register_profile("default", max_examples=300, deadline=None)
settings.register_profile("soak", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def as_user():
    """See errors as a user does: without the shape checks that pytest switches on."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def cpp_compiler():
    """Inductor writes C++. A reader's machine may have no compiler; CI's has one."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler is at hand")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Fast tests first: the browser and Colab come last."""
    late = ("test_pages", "test_colab")
    items.sort(key=lambda item: any(word in str(item.path) for word in late))
