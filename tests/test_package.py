"""The house keeps its order: sizes, docstrings, directions of import, the alphabet."""

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest
from chapter import ROOT, all_chapters
from export import imported_modules

from pgcore import __doc__ as ALPHABET
from pgcore import __version__
from pgcore.cli import main

PACKAGE = sorted((ROOT / "pgcore").rglob("*.py"))
CHAPTER_MODULES = [
    ROOT / "pgcore" / f"{module}.py"
    for c in all_chapters()
    for module in [c.module, *c.parts]
    if module
]
LETTERS = set(re.findall(r"\b([A-Z])  ", ALPHABET))

every_file = pytest.mark.parametrize(
    "path", PACKAGE, ids=lambda p: p.relative_to(ROOT).as_posix()
)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def lines_of_code(source: str) -> int:
    """Count lines, without blank ones, comments and docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    layout |= {tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0] for token in tokens if token.type not in layout}
    for node in ast.walk(ast.parse(source)):
        may_have_one = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if may_have_one and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_lines_of_code_are_those_that_do_something():
    assert lines_of_code('"""Doc\n\ndoc."""\n\nx = 1  # one\n# no\ny = """a"""\n') == 2


@every_file
def test_functions_are_short_and_modules_too(path):
    source = path.read_text()
    assert lines_of_code(source) <= 210  # with what the exporter adds
    for function in functions(ast.parse(source)):
        start = function.body[0].end_lineno if ast.get_docstring(function) else None
        length = function.end_lineno - (start or function.lineno)
        assert length <= 40, f"{function.name}: {length} lines"


@every_file
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            assert ast.get_docstring(node), node.name


def test_letters_in_shapes_are_those_of_the_alphabet():
    assert {"B", "D", "V", "R"} <= LETTERS
    for path in PACKAGE:
        for shape in re.findall(r'\w+\[[\w.]+, "([^"]*)"\]', path.read_text()):
            for letter in re.findall(r"(?<![a-zA-Z])[A-Z](?![a-zA-Z])", shape):
                assert letter in LETTERS, f"{path.name}: {shape}"


@pytest.mark.parametrize("path", CHAPTER_MODULES, ids=lambda p: p.stem)
def test_a_chapter_module_knows_nothing_of_plots_or_the_other_wing(path):
    for name in imported_modules(ast.parse(path.read_text())):
        assert not name.startswith(("pgcore.lab", "pgcore.cli", "matplotlib")), name
        assert "distributed" not in name, name


def test_importing_pgcore_is_quick_because_it_imports_no_torch():
    code = "import pgcore, sys; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stderr


def test_the_repository_address_is_the_same_everywhere():
    from chapter import repository

    url, _ = repository()
    for name in ("README.md", "CITATION.cff", "book/how-to-read.md"):
        found = re.findall(
            r"https://github\.com/[\w-]+/[\w-]+", (ROOT / name).read_text()
        )
        assert found and set(found) == {url}, f"{name}: {found}"


def test_nothing_tells_the_reader_to_install_somebody_elses_package():
    files = [
        *ROOT.glob("*.md"),
        *ROOT.glob("book/*.md"),
        *ROOT.glob("chapters/*.ipynb"),
    ]
    for path in files:
        assert not re.search(r"pip install [^\n]*\bpgcore\b(?! @)", path.read_text()), (
            path
        )


def test_command_line_lists_what_the_chapters_built(capsys):
    assert main(["modules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[1].removeprefix("pgcore.") for line in lines]
    assert listed == [path.stem for path in CHAPTER_MODULES]


@pytest.mark.parametrize("module", ["pgcore", "pgcore.cli"])
def test_command_line_says_its_version(module):
    if module == "pgcore.cli":
        command = [
            sys.executable,
            "-c",
            "from pgcore.cli import main; main(['--version'])",
        ]
    else:
        command = [sys.executable, "-m", module, "--version"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == f"pgcore {__version__}"


def test_command_line_refuses_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["paint"])
    assert stopped.value.code == 2
    assert "paint" in capsys.readouterr().err


def test_the_magic_line_makes_shapes_real():
    """Every chapter relies on it: a wrong shape fails at the call."""
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.run_cell('%load_ext pgcore.lab').raise_error()\n"
        "shell.run_cell('import torch\\nfrom jaxtyping import Float\\n'\n"
        "               'from torch import Tensor\\n'\n"
        "               'def f(x: Float[Tensor, \"B D\"]):\\n    return x\\n'\n"
        "               'f(torch.ones(2, 3))').raise_error()\n"
        "outcome = shell.run_cell('f(torch.ones(2))', silent=True)\n"
        "print('raised', type(outcome.error_in_exec).__name__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert "raised TypeCheckError" in result.stdout, result.stdout + result.stderr
