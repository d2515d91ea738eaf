"""Build the emoji sheets of pgcore/assets/emoji from pinned npm packages.

    python tools/build_emoji.py            # download, render, write (about 3 minutes)
    python tools/build_emoji.py --check    # compare the committed files, no download

Only the book's authors run this: the sheets are committed. The curated list of
concepts is tools/emoji_concepts.txt. The licences stand in
pgcore/assets/emoji/LICENSES.md, written by hand. The same packages and the same
pinned tools give the same bytes.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).parents[1] / "pgcore" / "assets" / "emoji"
CURATED = Path(__file__).with_name("emoji_concepts.txt")
LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ko", "pt", "ru", "zh")
TOOLS = {"pillow": "13.0.0", "resvg_py": "0.5.0"}

RENDERED = 144  # pixels a side, three times a cell: the downsizing sees every stroke
CELL = 48
COLUMNS = 24
COLOURS = 256  # a cell: 38 dB against the full picture, at half the bytes
FAINTEST = 8  # alpha below this is invisible and only costs bytes

# style -> npm package, version, SHA-256 of its archive
ART = {
    "noto": (
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto-v1": (
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "fluent": (
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojione": (
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "fxemoji": (
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    "twemoji": (
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "openmoji": (
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
}
NAMES = (
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
SHEETS = {style: f"{style}.webp" for style in ART} | {
    "openmoji": "share-alike/openmoji.webp"  # CC BY-SA 4.0 stays apart
}

# Found by eye on the sheets: the name is right, the drawing is of another thing.
WRONG = {
    ("noto-v1", "1f997"),  # the game of cricket, not the insect
    ("emojione", "1f997"),
    ("noto-v1", "1f52b"),  # a revolver, not a water pistol
    ("emojione", "1f52b"),
    ("openmoji", "1f4dc"),  # the wheel of a mouse, not a scroll of paper
}

Package = dict[str, bytes]  # path inside the archive -> contents


def download(package: str, version: str, digest: str, folder: Path) -> Package:
    """Fetch one npm package by name and version, and check its checksum."""
    wanted = f"{package}@{version}"
    run = subprocess.run(
        ["npm", "pack", "--silent", wanted],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        reason = (run.stderr.strip() or "no message").splitlines()[0]
        sys.exit(f"error: npm pack {wanted} failed ({reason}): is npm online?")
    archive = (folder / run.stdout.split()[-1]).read_bytes()
    if sha256(archive) != digest:
        sys.exit(f"error: {wanted} has SHA-256 {sha256(archive)}, expected {digest}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {
            member.name.removeprefix("package/"): file.read()
            for member in tar
            if (file := tar.extractfile(member))
        }


def bare(code: str) -> str:
    """Lower-case a code point and drop U+FE0F, which asks for colour only."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def curated() -> dict[str, tuple[str, str]]:
    """Read the list of concepts: code -> (English name, icon of fxemoji or "-")."""
    lines = CURATED.read_text("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {code: (name, icon) for code, name, icon in rows}


def slug(label: str) -> str:
    """Write a CLDR label as Iconify does: "woman's hat" -> "womans-hat"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", label.lower())).strip("-")


def icon_names(
    concepts: dict[str, tuple[str, str]], art: dict[str, Package]
) -> dict[str, dict[str, str]]:
    """Find each style's icon for each code: style -> code -> icon name.

    noto-v1 and emojione have no table of code points, but use CLDR's names, those of
    the styles with a table, or Unicode's older ones ("direct-hit" for the bullseye).
    fxemoji's names are its own: the curated list has them.
    """
    tables = {
        style: {
            bare(code): name for code, name in json.loads(package["chars.json"]).items()
        }
        for style, package in art.items()
    }
    known: dict[str, list[str]] = {code: [slug(concepts[code][0])] for code in concepts}
    for table in tables.values():
        for code in known.keys() & table.keys():
            known[code].append(table[code])
    for code, names in known.items():
        names.append(slug(unicodedata.name(chr(int(code, 16)), "")))
    for style in ("noto-v1", "emojione"):
        icons = json.loads(art[style]["icons.json"])
        drawn = icons["icons"].keys() | icons.get("aliases", {}).keys()
        for code, names in known.items():
            if name := next((name for name in names if name in drawn), None):
                tables[style][code] = name
    tables["fxemoji"] = {
        code: icon for code, (_, icon) in concepts.items() if icon != "-"
    }
    return {
        style: {
            code: name for code, name in table.items() if (style, code) not in WRONG
        }
        for style, table in tables.items()
    }


def render(icons: dict, name: str) -> Image.Image:
    """Draw one icon at RENDERED pixels a side, as RGBA."""
    import resvg_py  # pyright: ignore[reportMissingImports]  (authors only)

    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{RENDERED}" height="{RENDERED}" viewBox="{view}" color="#000">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def cell(picture: Image.Image) -> Image.Image:
    """Shrink to one cell of few colours; nothing faint remains around the object."""
    # "RGBa" is premultiplied: colours hidden under zero alpha never bleed out.
    small = picture.convert("RGBa").resize((CELL, CELL), Image.Resampling.LANCZOS)
    few = (
        small.convert("RGBA")
        .quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        .convert("RGBA")
    )
    visible = few.getchannel("A").point([255 * (a >= FAINTEST) for a in range(256)])
    return Image.composite(few, Image.new("RGBA", few.size), visible)


def sheet(cells: list[Image.Image]) -> bytes:
    """Lay the cells out in rows and encode them without loss."""
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, picture in enumerate(cells):
        row, column = divmod(index, COLUMNS)
        page.paste(picture, (column * CELL, row * CELL))
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def catalogue(
    concepts: dict[str, tuple[str, str]],
    emojibase: Package,
    cells: dict[str, dict[str, int]],
) -> bytes:
    """Write concepts.json: one concept a line, so that a change reads well."""
    groups = json.loads(emojibase["meta/groups.json"])["groups"]
    entries = {
        language: {
            bare(entry["hexcode"]): entry
            for entry in json.loads(emojibase[f"{language}/data.json"])
        }
        for language in LANGUAGES
    }
    lines = []
    for code, (name, _) in concepts.items():
        row = {
            "code": code,
            "group": groups[str(entries["en"][code]["group"])],
            "names": {lang: entries[lang][code]["label"] for lang in LANGUAGES}
            | {"en": name},
            "keywords": {lang: entries[lang][code]["tags"] for lang in LANGUAGES},
            "cells": {style: at[code] for style, at in cells.items() if code in at},
        }
        lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
    head = (
        f'"cell":{CELL},"columns":{COLUMNS},\n"languages":{json.dumps(LANGUAGES)},\n'
        f'"sheets":{json.dumps(SHEETS)},\n'
    )
    return ("{" + head + '"concepts":[\n' + ",\n".join(lines) + "\n]}\n").encode()


def build() -> None:
    """Download, render and write everything but the licences."""
    concepts = curated()
    with tempfile.TemporaryDirectory() as folder:
        art = {}
        for style, source in ART.items():
            print(f"download  {source[0]} {source[1]}", flush=True)
            art[style] = download(*source, Path(folder))
        print(f"download  {NAMES[0]} {NAMES[1]}", flush=True)
        emojibase = download(*NAMES, Path(folder))
    tables = icon_names(concepts, art)
    files: dict[str, bytes] = {}
    cells: dict[str, dict[str, int]] = {}
    for style, package in art.items():
        icons = json.loads(package["icons.json"])
        drawn = [code for code in concepts if code in tables[style]]
        cells[style] = {code: index for index, code in enumerate(drawn)}
        data = sheet([cell(render(icons, tables[style][code])) for code in drawn])
        files[SHEETS[style]] = data
        print(
            f"rendered  {style:9} {len(drawn)} pictures, {len(data):,} bytes",
            flush=True,
        )
    files["concepts.json"] = catalogue(concepts, emojibase, cells)
    sums = [f"{sha256(data)}  {name}\n" for name, data in sorted(files.items())]
    files["SHA256SUMS"] = "".join(sums).encode()
    for name, data in files.items():  # only now, so that a failure changes nothing
        (ASSETS / name).parent.mkdir(parents=True, exist_ok=True)
        (ASSETS / name).write_bytes(data)
    print(f"wrote     {sum(map(len, files.values())):,} bytes to {ASSETS}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check() -> None:
    """Compare the files with SHA256SUMS; exit with one line if any differs."""
    if not (ASSETS / "SHA256SUMS").is_file():
        sys.exit(f"error: {ASSETS / 'SHA256SUMS'} is missing: run without --check")
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    wanted = {name: digest for digest, name in (line.split("  ") for line in lines)}
    if wanted.keys() != {*SHEETS.values(), "concepts.json"}:
        sys.exit("error: SHA256SUMS lists other files than this script writes")
    for name, digest in wanted.items():
        if not (ASSETS / name).is_file():
            sys.exit(f"error: {name} is missing: restore it, or run without --check")
        if sha256((ASSETS / name).read_bytes()) != digest:
            sys.exit(f"error: {name} differs from SHA256SUMS: restore it, or rebuild")
    print(f"{len(wanted)} files agree with SHA256SUMS")


def check_tools() -> None:
    """Exit with one line if a tool is missing or is not the pinned version."""
    if not shutil.which("npm"):
        sys.exit("error: npm is missing: install Node.js, which brings it")
    for tool, version in TOOLS.items():
        try:
            found = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            sys.exit(f"error: {tool} is {found}: run pip install {tool}=={version}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not build")
    if parser.parse_args().check:
        check()
    else:
        check_tools()
        build()
