"""The built book, as files and as a browser shows it (``make pages`` builds it)."""

import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from chapter import ROOT, all_chapters

SITE = ROOT / "_build" / "html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts and "autoapi" not in path.parts
)
WRITTEN = [page for page in PAGES if page.startswith(("book/", "chapters/"))]
NEED_BROWSER = os.environ.get("PGCORE_NEED_BROWSER") == "1"
EVERY_SIZE = os.environ.get("PGCORE_PAGES") == "all"  # "make soak"

in_browser = pytest.mark.skipif(
    CHROMIUM is None and not NEED_BROWSER, reason="no Chromium on this machine"
)


class Links(HTMLParser):
    """What a page points to, loads, and can be pointed at."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.images_without_alt: list[str] = []
        self.feed(page.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {v for v in (values.get("id"), values.get("name")) if v}
        if tag == "a" and values.get("href"):
            self.targets.append(values["href"])
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loads.append(values["src"])
        relations = (values.get("rel") or "").split()
        if tag == "link" and {"stylesheet", "icon", "preload"} & set(relations):
            self.loads.append(values["href"])
        if tag == "img" and not values.get("alt"):
            self.images_without_alt.append(values.get("src", ""))


@functools.cache
def links_of(page: Path) -> Links:
    return Links(page)


every_page = pytest.mark.parametrize("page", PAGES)


def test_the_site_holds_the_pages_of_the_table_of_contents():
    assert SITE.is_dir(), 'run "make book" first'
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"], *(c["file"] for p in toc["parts"] for c in p["chapters"])]
    assert sorted(f"{file}.html" for file in files) == WRITTEN


def test_styles_load_nothing_from_elsewhere():
    for path in SITE.rglob("*.css"):
        text = path.read_text(encoding="utf8", errors="replace")
        assert not re.search(r"url\([\"']?(https?:)?//", text), path


@every_page
def test_nothing_is_loaded_from_elsewhere(page):
    outside = [url for url in links_of(SITE / page).loads if urlsplit(url).netloc]
    assert not outside


@every_page
def test_links_within_the_book_lead_somewhere(page):
    for target in links_of(SITE / page).targets + links_of(SITE / page).loads:
        url = urlsplit(target)
        if url.scheme or url.netloc:
            continue
        path = (SITE / page).parent / unquote(url.path) if url.path else SITE / page
        assert path.exists(), target
        if url.fragment and path.suffix == ".html":
            assert unquote(url.fragment) in links_of(path).anchors, target


@every_page
def test_pictures_have_alt_text(page):
    assert not links_of(SITE / page).images_without_alt


@pytest.mark.parametrize("page", WRITTEN)
def test_the_page_describes_itself(page):
    text = (SITE / page).read_text(encoding="utf8")
    assert re.search(r'<meta[^>]+name="description"', text)
    assert '<html lang="en"' in text
    article = text[text.index("<article") : text.index("</article>")]
    assert len(re.findall(r"<h1[ >]", article)) == 1


@pytest.mark.parametrize("chapter", all_chapters(), ids=lambda c: c.number)
def test_chapter_pages(chapter):
    page = SITE / chapter.relative_path.replace(".ipynb", ".html")
    text = page.read_text(encoding="utf8")
    # Once in the header, where Jupyter Book makes it, and once in the text.
    assert links_of(page).targets.count(chapter.colab_address) >= 2
    shown = re.sub(r"<[^>]+>", "", text)
    assert "#| export" not in shown and "google.colab" not in shown
    exports = len(chapter.code_of("export"))
    assert text.count("goes into pgcore.") == exports
    assert text.count("Show one solution") >= 3


@pytest.fixture(scope="module")
def address():
    """Serve the site on this machine; yield its address."""
    handler = functools.partial(QuietHandler, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield functools.partial(
            playwright.chromium.launch_persistent_context,
            executable_path=CHROMIUM or "chromium",
            headless=True,
            args=CHROMIUM_FLAGS,
        )


@pytest.fixture(scope="module", params=SIZES)
def context(request, browser, tmp_path_factory):
    width, height = SIZES[request.param]
    context = browser(
        str(tmp_path_factory.mktemp("profile")),
        viewport={"width": width, "height": height},
    )
    yield context
    context.close()


@in_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", WRITTEN)
def test_the_browser_shows_the_page(page, theme, context, address):
    on_phone = context.pages[0].viewport_size["width"] < 500
    everywhere = page.startswith("chapters/") or EVERY_SIZE
    if not everywhere and on_phone == (theme == "dark"):
        pytest.skip("this page at this size and theme is left to make soak")
    tab = context.new_page()
    tab.emulate_media(color_scheme=theme)
    complaints, requests = [], []
    tab.on("request", lambda r: requests.append(r.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "console",
        lambda m: m.type in ("error", "warning") and complaints.append(m.text),
    )
    tab.on("response", lambda r: r.status >= 400 and complaints.append(r.url))
    tab.goto(f"{address}/{page}", wait_until="load")
    tab.wait_for_function(
        "!window.MathJax?.startup?.promise || "
        "window.MathJax.startup.promise.then(() => true)"
    )
    assert not complaints
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
    seen = tab.evaluate(
        """() => ({
            overflow: document.documentElement.scrollWidth - window.innerWidth,
            formulas: document.querySelectorAll('.math').length,
            rendered: document.querySelectorAll('mjx-container').length,
            errors: document.querySelectorAll('mjx-merror').length,
            theme: document.documentElement.dataset.theme,
            opened: document.querySelectorAll('.cell details[open]').length,
        })"""
    )
    tab.close()
    assert seen["overflow"] <= 0, "the page scrolls sideways"
    assert seen["errors"] == 0
    assert seen["rendered"] >= seen["formulas"]
    assert seen["theme"] == theme
    assert seen["opened"] == 0, "solutions are folded"


@in_browser
def test_the_search_finds_a_chapter(context, address):
    tab = context.new_page()
    tab.goto(f"{address}/search.html?q=softmax")
    tab.wait_for_selector("#search-results li a")
    found = tab.eval_on_selector_all(
        "#search-results li a", "all => all.map(a => a.href)"
    )
    tab.close()
    assert any("/chapters/" in url for url in found)
