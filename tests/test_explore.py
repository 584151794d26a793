"""explore.html in headless Chromium: its formulas are toy2d's, and it answers to hand and keys."""

import functools
import json
from pathlib import Path

import pytest
import torch
from browser import needed

import rf
from toy2d import GaussianMixture, load_mixture

PAGE = Path(__file__).parents[1] / "explore.html"


@pytest.fixture
def page(browser):
    browser("Page.enable")
    browser("Page.navigate", url=PAGE.as_uri())
    while not browser.js("document.readyState === 'complete' && !!window.flow"):
        pass
    return browser


PATHS = {
    "rf": rf.RectifiedFlow(),
    "cosine": rf.Cosine(),
    "linear": rf.LDMLinear(),
    "edm": rf.EDM(-1.2, 1.2),
}


def both(page, mixture, path, z, t):
    """u_t(z) and log p_t(z), by toy2d and by the page."""
    exact = PATHS[path]
    own = mixture.velocity(z, t, exact), mixture.log_density(z, t, exact)
    calls = json.dumps([[x, y, s] for (x, y), s in zip(z.tolist(), t.tolist(), strict=True)])
    said = page.js(
        f"{calls}.map(([x, y, t]) => [...flow.velocity('{path}', t, [x, y]),"
        f" flow.logDensity('{path}', t, [x, y])])"
    )
    return torch.cat([own[0], own[1][:, None]], 1), torch.tensor(said, dtype=torch.float64)


@needed
@pytest.mark.parametrize("mixture", ["ring", "grid", "spiral"])
def test_its_flow_is_ours(page, mixture):
    """To 1e-6, at random points of every path; and for a mixture that a reader has made."""
    page.choose("mixture", mixture)
    truth, generator = load_mixture(mixture), torch.Generator().manual_seed(0)
    for path in PATHS:
        t = 0.02 + 0.96 * torch.rand(200, generator=generator, dtype=torch.float64)
        x0, _ = truth.sample(200, generator)
        eps = torch.randn(200, 2, generator=generator, dtype=torch.float64)
        z = PATHS[path].interpolate(x0.double(), eps, t)
        expected, said = both(page, truth, path, z, t)
        torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-6)
    page.js("document.getElementById('scene').focus()")
    for key in ("n", "ArrowUp", "a", "ArrowLeft"):
        page.key(key)
    means, covs, weights = (
        page.js(f"flow.state.mixture.{k}") for k in ("means", "covs", "weights")
    )
    own = GaussianMixture(means, [[[xx, xy], [xy, yy]] for xx, xy, yy in covs], weights)
    assert len(own.weights) == len(truth.weights) + 1
    expected, said = both(page, own, "rf", z / 2, t)
    torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-6)


@needed
def test_the_slider_and_the_walk(page):
    """The picture changes with t; in many steps the sampler ends where the exact flow does, in few
    only PeRFlow's student does, and its windows can be moved."""
    pictures = []
    for t in (1, 0.4, 0):
        page.choose("t", t)
        pictures.append(page.screenshot())
    for a, b in zip(pictures, pictures[1:], strict=False):
        assert (a != b).any(-1).mean() > 0.05
    distance = lambda: float(page.js("document.getElementById('distance').value"))
    floor = float(page.js("document.getElementById('floor').value"))
    told = {}
    for solver, steps in (
        ("first", 4),
        ("first", 50),
        ("heun", 25),
        ("perflow", 4),
        ("perflow", 1),
    ):
        page.choose("solver", solver)
        page.choose("steps", steps)
        told[solver, steps] = distance()
    assert told["first", 4] > 5 * floor
    for close in (("first", 50), ("heun", 25), ("perflow", 4), ("perflow", 1)):
        assert abs(told[close] - floor) < 1.5e-3, close
    assert told["first", 4] > 3 * told["perflow", 4]
    page.choose("steps", 3)
    edges = page.js("flow.state.edges")
    assert edges == pytest.approx([2 / 3, 1 / 3])
    page.js(
        "(() => { const x = document.querySelector('[data-edge]'); x.value = 0.9;"
        " x.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )
    assert page.js("flow.state.edges") == pytest.approx([0.9, 1 / 3])
    assert page.js("flow.state.walk.length") == 4


@needed
def test_the_exact_curves_end_in_the_data(page):
    """They are the flow of toy2d, from the same noise."""
    page.choose("mixture", "grid")
    noise, end = (
        torch.tensor([*page.js(f"Array.from({name})")], dtype=torch.float64).reshape(-1, 2)
        for name in ("flow.state.curves[0]", "flow.state.curves.at(-1)")
    )
    field = load_mixture("grid").field(rf.RectifiedFlow())
    exact = rf.solve(field, noise, steps=400, method="heun")
    apart = (end - exact).norm(dim=1)
    assert len(noise) == 700 and apart.median() < 0.01 and (apart < 0.1).double().mean() > 0.97


@needed
def test_a_mode_is_dragged_added_and_removed(page):
    box = page.js("(({left, top, width}) => [left, top, width])(scene.getBoundingClientRect())")
    at = lambda x, y: dict(
        x=box[0] + (x / 2.7 + 1) * box[2] / 2, y=box[1] + (1 - y / 2.7) * box[2] / 2
    )
    mouse = functools.partial(page, "Input.dispatchMouseEvent", button="left")
    means = lambda: page.js("flow.state.mixture.means")
    x, y = means()[0]
    mouse(type="mousePressed", clickCount=1, buttons=1, **at(x, y))
    mouse(type="mouseMoved", buttons=1, **at(0.5, 0.25))
    mouse(type="mouseReleased", clickCount=1, **at(0.5, 0.25))
    assert means()[0] == pytest.approx([0.5, 0.25], abs=0.01)
    assert page.js("document.getElementById('mixture').value") == "your own"
    for place in ((9, 9), (0.5, 0.25)):  # dragged away, it stays where it can be taken again
        at_rim = lambda x: max(-2.6, min(2.6, x))
        mouse(type="mousePressed", clickCount=1, buttons=1, **at(*map(at_rim, means()[0])))
        mouse(type="mouseMoved", buttons=1, **at(*place))
        mouse(type="mouseReleased", clickCount=1, **at(*place))
        assert means()[0] == pytest.approx([*map(lambda x: min(x, 2.6), place)], abs=0.01)
    for count in (9, 8):
        for clicks in (1, 2):
            mouse(type="mousePressed", clickCount=clicks, buttons=1, **at(-0.2, -0.1))
            mouse(type="mouseReleased", clickCount=clicks, **at(-0.2, -0.1))
        assert len(means()) == count
    more = "for (let i = 8; i < 59; i++) means.push([0, 0]), covs.push(covs[0]), weights.push(1);"
    page.js(f"(({{means, covs, weights}}) => {{ {more} }})(flow.state.mixture)")
    page.js("for (let i = 0; i < 3; i++) scene.onkeydown(new KeyboardEvent('keydown', {key: 'a'}))")
    assert len(means()) == 60


@needed
def test_it_fits_a_phone_and_plays(page):
    how = dict(height=800, deviceScaleFactor=2, mobile=True)
    page("Emulation.setDeviceMetricsOverride", width=360, **how)
    assert page.js("document.documentElement.scrollWidth") <= 360
    page("Emulation.clearDeviceMetricsOverride")
    dark = dict(features=[dict(name="prefers-color-scheme", value="dark")])
    light = page.screenshot().mean()
    page("Emulation.setEmulatedMedia", **dark)
    assert page.screenshot().mean() < 0.5 * light
    page("Emulation.setEmulatedMedia", features=[])
    page.choose("t", 1)
    frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
    page.js(f"new Promise((done) => {{ get('play').click(); {frames} }})")
    assert 0.9 < page.js("value('t')") < 1


def test_it_is_short_and_alone():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 400
    assert not any(word in text for word in ("http://", "https://", "import ", "src="))
