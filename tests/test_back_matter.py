"""The back matter keeps up with the chapters."""

import re

from chapter import ROOT, all_chapters

GLOSSARY = (ROOT / "book" / "glossary.md").read_text()
TERMS = re.findall(r"^(\S.*)\n  \S", GLOSSARY, flags=re.M)
PROSE = "\n".join(
    cell.source
    for chapter in all_chapters()
    for cell in chapter.notebook.cells
    if cell.cell_type == "markdown"
)


def test_terms_are_sorted_and_stand_once():
    assert sorted(set(TERMS), key=str.lower) == TERMS


def test_the_alphabet_is_the_same_in_the_package_and_on_the_page():
    import pgcore

    page = (ROOT / "book" / "notation.md").read_text()
    in_package = dict(re.findall(r"\b([A-Z])  (\S+)", pgcore.__doc__))
    on_page = dict(re.findall(r"^\| `([A-Z])` \| `?([^\s:|`]+)", page, flags=re.M))
    assert len(in_package) == 14
    assert in_package == on_page


def test_every_reference_is_cited_somewhere():
    keys = re.findall(
        r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.M
    )
    pages = PROSE + "".join(p.read_text() for p in (ROOT / "book").glob("*.md"))
    cited = set(re.findall(r"\{cite:[tp]\}`([^`]+)`", pages))
    assert set(keys) == {key for group in cited for key in group.split(",")}


def test_the_errata_treat_every_claim_of_the_notes():
    page = (ROOT / "book" / "errata.md").read_text()
    claims = re.findall(r"^\*\*C(\d\d)\*\*", page, flags=re.M)
    assert [int(number) for number in claims] == list(range(8, 85))
