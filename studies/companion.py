"""The papers as a page: every equation beside its code, its tests and its picture.

    python -m studies.companion        writes companion.html, and the map into README.md

All of it is cut from the source by name: equations from `studies.equations`, code and sentences
from the modules and their docstrings, claims from the tests. It needs latex2mathml and Pygments."""

import ast
import functools
import html
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path as File
from string import Template

import torch

import rf
import toy2d
from perflow import PeRFlow
from rf import InputError, formulation
from studies.equations import LINES, SECTIONS, Row
from training.folder import written
from training.options import command

HERE = File(__file__).parents[1]
ROWS = [row for rows in SECTIONS.values() for row in rows]
MAP = "| equation or § | function | test |\n|---|---|---|\n"


# ---- What is cut from the source
@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((HERE / file).read_text())


def cut(name: str) -> tuple[str, int, list[str], str]:
    """An object by its full name: its file, its first line's number, its lines, its docstring. The
    docstring's lines are empty ones. KeyError where it is not there."""
    parts = name.split(".")
    k = next(k for k in (1, 2) if (HERE / "/".join(parts[:k])).with_suffix(".py").exists())
    file = "/".join(parts[:k]) + ".py"
    node = tree(file)
    for part in parts[k:]:
        named = {n: child for child in node.body for n in names_of(child)}
        node = named[part]
    lines = (HERE / file).read_text().splitlines()[node.lineno - 1 : node.end_lineno]
    first = node.body[0] if hasattr(node, "body") else None
    text = isinstance(first, ast.Expr) and ast.get_docstring(node)
    for i in range(first.lineno, first.end_lineno + 1) if text else ():
        lines[i - node.lineno] = ""
    return file, node.lineno, lines, text or ""


def names_of(node: ast.AST) -> Iterator[str]:
    """What a statement defines: a function, a class, or variables."""
    if hasattr(node, "name"):
        yield node.name
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        if isinstance(target, ast.Name):
            yield target.id


@functools.cache
def tests() -> dict[str, tuple[str, int, str]]:
    """{test function: its file, line and claim}: its docstring's first sentence, or its name."""
    found = {}
    for file in sorted(HERE.glob("tests/test_*.py")):
        for node in tree(f"tests/{file.name}").body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                claim = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                said = claim or node.name.removeprefix("test_").replace("_", " ")
                found[node.name] = f"tests/{file.name}", node.lineno, said
    return found


# ---- Pictures, drawn from the code
def svg(curves: dict, x: str, y: str) -> str:
    """Curves {name: (x (n,), y (n,))} in one small frame, their names beside it."""
    W, H, left = 270, 150, 38
    xs, ys = (torch.cat([curve[i] for curve in curves.values()]).double() for i in (0, 1))
    place = lambda v, of, size: (v - of.min()) / (of.max() - of.min()) * size
    parts = [f'<path d="M{left} 0V{H}H{W}"/>']
    for i, (name, (u, v)) in enumerate(curves.items()):
        at = zip(left + place(u, xs, W - left), H - place(v, ys, H), strict=True)
        points = " ".join(f"{p:.0f},{q:.1f}" for p, q in at)
        parts.append(f'<polyline class="c{i}" points="{points}"/>')
        parts.append(f'<text class="c{i}" x="{W + 8}" y="{12 + 14 * i}">{html.escape(name)}</text>')
    ends = [(left - 4, H, "end", ys.min()), (left - 4, 9, "end", ys.max())]
    ends += [(left, H + 13, "start", xs.min()), (W, H + 13, "end", xs.max())]
    parts += [
        f'<text x="{p}" y="{q}" text-anchor="{a}">{round(v.item(), 2):g}</text>'
        for p, q, a, v in ends
    ]
    parts.append(f'<text x="{(left + W) / 2}" y="{H + 13}" text-anchor="middle">{x}</text>')
    frame = f'<svg viewBox="0 -4 420 {H + 22}" role="img" aria-label="{y} over {x}">'
    return f"<figure>{frame}{''.join(parts)}</svg><figcaption>{y}, over {x}</figcaption></figure>"


T = torch.linspace(0.01, 0.99, 61, dtype=torch.float64)
over_t = lambda curves, y: svg({name: (T, f(T)) for name, f in curves.items()}, "t", y)
densities = lambda *names: over_t({n: formulation(n).timesteps.density for n in names}, "π(t)")


def paths() -> str:
    of = {"rf": rf.RectifiedFlow(), "cosine": rf.Cosine(), "LDM-linear": rf.LDMLinear()}
    curves = {f"{name}: {k}": getattr(path, k) for name, path in of.items() for k in "ab"}
    return over_t(curves, "a and b")


def log_snr() -> str:
    names = "rf", "v/cos", "eps/linear", "edm(-1.20,1.20)"
    return over_t({name: formulation(name).path.log_snr for name in names}, "λ of the paths")


def weights() -> str:
    names = "rf", "rf/lognorm(0.00,1.00)", "eps/cos", "v/cos", "edm(-1.20,1.20)"
    of = {name: formulation(name).weight for name in names}
    return over_t({name: lambda t, w=w: w(t).log10() for name, w in of.items()}, "log10 of w")


def shift() -> str:
    of = {f"s = {s}": partial(rf.RectifiedFlow().shift, s=s) for s in (1, 2, 3, 6)}
    return over_t(of, "t of the large picture")


def window() -> str:
    """A coordinate of one exact trajectory, and what PeRFlow makes of it in four windows."""
    field, z = toy2d.load_mixture("ring").field(rf.RectifiedFlow()), torch.tensor([[0.3, -1.6]])
    t = torch.linspace(1, 0, 81, dtype=torch.float64)
    flow = toy2d.trajectory(field, z.double(), t)[:, 0, 0]
    edges = (80 * (1 - PeRFlow(None, rf.RectifiedFlow()).edges.flip(0))).long()
    lines = {"the teacher": (t, flow), "the student": (t[edges], flow[edges])}
    return svg(lines, "t", "a coordinate of z")


PICTURES: dict[str, Callable[[], str]] = {
    "paths": paths, "log_snr": log_snr, "weights": weights, "shift": shift, "window": window,
    "lognorm": partial(densities, *(f"rf/lognorm({ms})" for ms in ("0,1", "0.5,0.6", "-0.5,1"))),
    "mode": partial(densities, "rf/mode(-1)", "rf", "rf/mode(0.83)", "rf/mode(1.29)"),
    "cosmap": partial(densities, "rf/cosmap", "rf"),
}  # fmt: skip


# ---- The page
KINDS = {  # of Pygments' tokens, by the class in the page
    "Keyword": "k", "Literal.String": "s", "Comment": "c", "Literal.Number": "m",
    "Name.Function": "f", "Name.Class": "f",
}  # fmt: skip


def highlighted(number: int, lines: list[str]) -> str:
    """Code with its line numbers, coloured by the kind of each token. One empty line stands for a
    docstring."""
    from pygments.lexers import PythonLexer

    text = ""
    for token, value in PythonLexer(stripnl=False).get_tokens("\n".join(lines)):
        kinds = (css for kind, css in KINDS.items() if str(token).startswith(f"Token.{kind}"))
        head, tail = (f'<b class="{css}">', "</b>") if (css := next(kinds, "")) else ("", "")
        parts = html.escape(value, quote=False).split("\n")
        text += "\n".join(part and head + part + tail for part in parts)
    code = enumerate(text.rstrip("\n").split("\n"))
    shown = [(i, line) for i, line in code if lines[i] or (i and lines[i - 1])]
    return "\n".join(f"<i>{number + i:>4} </i>{line}" for i, line in shown)


def prose(text: str) -> str:
    """A docstring as HTML: its lines joined, names in backticks as code."""
    joined = " ".join(html.escape(text, quote=False).split())
    return re.sub("`([^`]+)`", r"<code>\1</code>", joined)


def article(row: Row) -> str:
    """The docstring of the first object that has one is the row's text; the others stand above
    their code."""
    from latex2mathml.converter import convert

    math = "".join(convert(line, display="block") for line in row.tex.split(r" \\ "))
    top = '<a href="#contents" aria-label="to the contents">↑</a>'
    left = [f'<h3><a href="#{row.id}">{row.title}</a> {top}</h3><div class="tex">{math}</div>']
    right = []
    for name in row.code:
        file, number, lines, doc = cut(name)
        place = f'<div class="at"><a href="{file}#L{number}">{file}:{number}</a> {name}</div>'
        text = [f"<p>{prose(doc)}</p>"] if doc else []
        code = f'<pre tabindex="0">{highlighted(number, lines)}</pre>'
        if len(left) == 1:
            left, text = left + text, []
        right += [place, *text, code]
    left += [f'<p class="note">{prose(row.note)}</p>'] if row.note else []
    left += [PICTURES[row.picture]()] if row.picture else []
    proofs = []
    for name in row.tests:
        file, number, claim = tests()[name]
        place = f'<a href="{file}#L{number}"><code>{file}:{number} {name}</code></a>'
        proofs.append(f"<li>{prose(claim)}<br>{place}")
    right.append(f'<ul class="tests">{"".join(proofs)}</ul>')
    return f'<article id="{row.id}"><div>{"".join(left)}</div><div>{"".join(right)}</div></article>'


def page() -> str:
    nav, parts = [], []
    for title, rows in SECTIONS.items():
        links = "".join(f'<li><a href="#{row.id}">{row.title}</a>' for row in rows)
        nav.append(f"<strong>{title}</strong><ul>{links}</ul>")
        parts.append(f"<h2>{title}</h2>{''.join(map(article, rows))}")
    template = Template((HERE / "studies/companion.template.html").read_text())
    return template.substitute(contents="".join(nav), rows="".join(parts))


def the_map() -> str:
    """The README's table: a line has the functions and the first tests of its rows."""
    lines = []
    for line, brief in LINES.items():
        rows = [row for row in ROWS if row.line == line]
        names = dict.fromkeys(name for row in rows for name in row.code if "._" not in name)
        proofs = dict.fromkeys(row.tests[0] for row in rows)
        links = f"[{brief}](companion.html#{rows[0].id})".replace("|", "\\|")
        code = lambda words: ", ".join(f"`{word}`" for word in words)
        lines.append(f"| {links} | {code(names)} | {code(proofs)} |")
    return MAP + "\n".join(lines) + "\n"


def with_map(readme: str) -> str:
    """The README with today's map."""
    before, rest = readme.split(MAP)
    return before + the_map() + rest[rest.index("\n\n") + 1 :]


def run() -> None:
    try:
        text = page()
    except ImportError as error:
        missing = f"the page needs {error.name}: pip install latex2mathml pygments"
        raise InputError(missing) from None
    readme = with_map((HERE / "README.md").read_text())
    for file, content in {"companion.html": text, "README.md": readme}.items():
        with written(HERE / file) as out:
            out.write(content.encode())
        print(f"wrote {file}, {len(content.encode()) // 1000} kB")


if __name__ == "__main__":
    command(run, __doc__)
