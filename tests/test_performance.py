"""The page of figures says what was measured, and nothing else."""

import json

import pytest
from bench import PAGE, RESULT, page_of


def test_the_page_is_made_from_the_figures():
    assert PAGE.read_text(encoding="utf8") == page_of(json.loads(RESULT.read_text()))


def test_both_formats_both_batches_and_the_machine_are_there():
    report = json.loads(RESULT.read_text())
    assert {"processor", "cores", "torch", "transformers"} <= report["machine"].keys()
    measured = {(r["dtype"], r["batch"]) for r in report["rows"] if "batch" in r}
    assert measured == {(d, b) for d in ("bfloat16", "float32") for b in (1, 4)}


@pytest.mark.parametrize("what", ["prefill", "first token", "step"])
def test_each_figure_is_there_for_both_sides(what):
    for row in json.loads(RESULT.read_text())["rows"]:
        if "batch" in row:
            assert {"transformers", "pgcore"} <= row["seconds"][what].keys()
            assert all(0 < s < 60 for s in row["seconds"][what].values())
