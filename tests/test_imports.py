"""What each file imports: the core stands by itself, and all imports run one way."""

import ast
import graphlib
import sys

from helpers import ROOT

CORE = ["rf", "mmdit", "toy2d", "perflow"]
ORDER = [
    *CORE, "training.options", "training.ranks", "training.optimizer", "training.folder",
    "sd3.text", "sd3.weights",
    "data.pictures", "data.networks", "data.base", "data.toy", "data.shapes", "data.cifar10",
    "data.latents", "data.encode", "training.checkpoint", "training.configure", "sample", "train",
]  # fmt: skip
PLACES = (".", "data", "sd3", "training", "studies")
FILES = [file.relative_to(ROOT) for place in PLACES for file in (ROOT / place).glob("[!_]*.py")]
MODULES = {".".join(file.with_suffix("").parts): file for file in FILES}
OURS = {name.partition(".")[0] for name in MODULES}


def imported(name: str) -> set[str]:
    """The modules that a file imports, anywhere in it. Ours are each a file, not a package."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / MODULES[name]).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            files = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= files or {node.module}
    return found


def test_the_core_imports_torch_numpy_and_itself_only():
    known = {*sys.stdlib_module_names, "torch", "numpy", *CORE}
    for name in CORE:
        assert {module.partition(".")[0] for module in imported(name)} <= known, name


def test_imports_run_one_way():
    """A file imports from those before it in the list, a study from all of them. Nothing imports
    from studies but studies, and they in no circle."""
    ours = {n: {m for m in imported(n) if m.partition(".")[0] in OURS} for n in MODULES}
    studies = {name for name in MODULES if name.startswith("studies.")}
    assert {*MODULES} == {*ORDER} | studies  # no file is forgotten
    for i, name in enumerate(ORDER):
        assert ours[name] <= {*ORDER[:i]}, name
    for name in studies:
        assert ours[name] <= {*ORDER} | studies, name
    graphlib.TopologicalSorter(ours).prepare()
