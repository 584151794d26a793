"""companion.html: made of the present source, whole, and readable at any width and by key."""

import html
import importlib
import json
import re
from pathlib import Path

import pytest
from browser import needed

from studies import companion
from studies.equations import LINES, SECTIONS

HERE = Path(__file__).parents[1]
PAGE = HERE / "companion.html"
MESSAGES = "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"
ROWS = [row for rows in SECTIONS.values() for row in rows]


def told(page):
    """What a reader reads: without tags, and without the blanks that they leave."""
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", page)).split())


def test_the_page_is_up_to_date():
    pytest.importorskip("latex2mathml"), pytest.importorskip("pygments")
    assert told(companion.page()) == told(PAGE.read_text()), "python -m studies.companion"


def test_the_readmes_map_is_up_to_date():
    readme = (HERE / "README.md").read_text()
    assert companion.with_map(readme) == readme, "python -m studies.companion"
    assert companion.with_map(readme.replace("`rf.solve`", "`rf.solved`")) == readme
    assert readme.index("companion.html") < readme.index("## Two commands")
    assert "companion.html" in (HERE / "explore.html").read_text()
    assert "explore.html" in PAGE.read_text()


def test_every_equation_has_its_row():
    ids = [row.id for row in ROWS]
    assert len({*ids}) == len(ids) and {f"eq-{n}" for n in range(1, 23)} <= {*ids}
    numbers = [int(i.removeprefix("eq-")) for i in ids if i.startswith("eq-")]
    assert numbers == sorted(numbers)  # in the paper's order
    assert {row.line for row in ROWS} == LINES.keys()
    assert {row.picture for row in ROWS} - {""} == companion.PICTURES.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_rows_code_and_tests_are_there(row):
    """The code holds the equation's number, or its symbol; it can be imported under that name."""
    code = ""
    for name in row.code:
        file, number, lines, doc = companion.cut(name)
        assert (HERE / file).read_text().splitlines()[number - 1] == lines[0]
        code += "\n".join([*lines, doc])
        module = file.removesuffix(".py").replace("/", ".")
        found = importlib.import_module(module)
        for part in name.removeprefix(module + ".").split("."):
            found = getattr(found, part)
    mark = row.mark or re.match(r"\(\d+\)", row.title)[0]
    assert mark in code, mark
    assert row.tests and all(companion.tests()[name] for name in row.tests)


def test_what_is_cut_is_the_source_less_its_docstring():
    file, number, lines, doc = companion.cut("rf.Path.interpolate")
    source = (HERE / "rf.py").read_text().splitlines()[number - 1 :][: len(lines)]
    assert file == "rf.py" and doc.startswith("(2), and (4)")
    assert [line for line in source if '"""' not in line] == [line for line in lines if line]
    _, _, table, doc = companion.cut("rf.PREDICTIONS")
    assert table[-1] == "}" and doc == ""
    with pytest.raises(KeyError):
        companion.cut("rf.Path.interpolated")


def test_the_page_is_small_and_needs_nothing():
    page = PAGE.read_text()
    assert len(page.encode()) <= 400_000
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org/1998", "")
    assert "https://" not in page and "@import" not in page
    links = [*re.findall(r'href="([^"]*)"', page)]
    anchors = {f"#{i}" for i in re.findall(r' id="([^"]*)"', page)}
    assert {link for link in links if link.startswith("#")} == anchors  # the contents are whole
    assert all((HERE / link.split("#")[0]).exists() for link in links)


@needed
@pytest.mark.parametrize("width", [360, 900, 1400])
def test_it_reads_at_this_width(browser, width):
    """Nothing is wider than the window; equations are typeset; a shared anchor is at the top; the
    first Tab is the first link; light and dark differ; the console is silent."""
    browser("Page.enable"), browser("Runtime.enable"), browser("Log.enable")
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=False,
    )
    browser("Page.navigate", url=PAGE.as_uri() + "#eq-19")
    while not browser.js("document.readyState === 'complete' && !!document.querySelector('nav')"):
        pass
    assert browser.js("document.documentElement.scrollWidth") <= width
    measure = lambda of, what: json.loads(
        browser.js(f"JSON.stringify([...{of}].map(e => e.getBoundingClientRect().{what}))")
    )
    heights = measure("document.querySelectorAll('math')", "height")
    assert len(heights) >= len(ROWS) and min(heights) > 10
    (top,) = measure("[document.getElementById('eq-19')]", "top")
    assert abs(top) < 40
    left, right = measure("document.querySelector('#eq-19').children", "left")
    assert (right > left + 200) == (width > 960)  # two columns, or one above the other
    browser.key("Tab")
    assert browser.js("document.activeElement.tagName") == "A"
    shades = []
    for scheme in ("light", "dark"):
        features = [dict(name="prefers-color-scheme", value=scheme)]
        browser("Emulation.setEmulatedMedia", media="", features=features)
        shades.append(browser.screenshot().mean())
    assert shades[0] > 180 > 80 > shades[1]
    browser("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser("Emulation.setEmulatedMedia", media="", features=[])
    browser("Emulation.clearDeviceMetricsOverride")
    assert not [m for m in browser.events if m["method"] in MESSAGES]
