"""Chapters compare with a library only where it is there, and new enough."""

import pytest

from pgcore.lab import oracles


@pytest.mark.parametrize(
    ("there", "at_least", "expected"),
    [("5.9.0", "5.9", True), ("5.10", "5.9", True), ("5.0.0", "5.9", False)],
)
def test_versions_are_compared_as_versions(monkeypatch, there, at_least, expected):
    monkeypatch.setattr(oracles, "version", lambda library: there)
    assert oracles.is_installed("transformers", at_least) is expected


def test_what_is_not_there_is_not_there():
    assert oracles.is_installed("torch")
    assert not oracles.is_installed("no-such-library")
