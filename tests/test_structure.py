"""The floor plan holds: imports run downward only, one place knows DeepSpeed, the model folder stands alone."""

import ast
import re
from pathlib import Path

from conftest import ROOT

LEVELS = [
    {"exit_codes"},
    {"errors", "faults", "__init__"},
    {"budget", "config"},
    {"data", "model", "parallel", "checkpoint"},
    {"train", "evaluate", "infer", "export"},
    {"cli", "cli_data", "cli_plan", "launching", "slurm"},
]
SIDEWAYS = {
    ("train", "export"),
    ("evaluate", "export"),
    ("infer", "export"),
    ("cli", "infer"),
    ("cli", "launching"),
    ("cli", "cli_data"),
    ("cli", "cli_plan"),
}
"""Rooms that may look into a neighbour of the same level."""


def modules():
    for path in sorted((ROOT / "tokenflex").rglob("*.py")):
        yield path, path.relative_to(ROOT / "tokenflex").with_suffix("").parts


def imports(path, parts):
    """(top package, room or None) of every import in a file; relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = ("tokenflex", *parts)[: len(parts) + 1 - node.level] if node.level else ()
            target = (*base, *(node.module.split(".") if node.module else ()))
            yield from (
                ((*target, alias.name) for alias in node.names) if node.module is None or node.level else [target]
            )


def level(room):
    return next(number for number, rooms in enumerate(LEVELS) if room in rooms)


def test_imports_run_downward():
    for path, parts in modules():
        room = parts[0]
        for target in imports(path, parts):
            if target[0] != "tokenflex" or len(target) < 2 or target[1] in (room, "__version__"):
                continue
            other = target[1]
            assert level(other) < level(room) or (room, other) in SIDEWAYS, f"{path} imports {'.'.join(target)}"


def test_only_parallel_knows_deepspeed():
    for path, parts in modules():
        if parts[0] != "parallel":
            assert not any(target[0] == "deepspeed" for target in imports(path, parts)), path


TRAVELLING = [
    "configuration_tokenflex",
    "modeling_tokenflex",
    "processing_tokenflex",
    "image_processing_tokenflex",
    "pooling",
    "projector",
    "tiling",
    "vision",
]


def test_the_exported_model_code_stands_alone():
    allowed = {
        "torch",
        "transformers",
        "PIL",
        "numpy",
        "math",
        "functools",
        "re",
        "dataclasses",
        "pathlib",
        "io",
        "simplejpeg",
        "tokenflex_kernels",
    }
    for name in TRAVELLING:
        path = ROOT / "tokenflex" / "model" / f"{name}.py"
        for target in imports(path, ("model", name)):
            if target[0] == "tokenflex":
                assert target[1] == "model" and target[2] in TRAVELLING, f"{path} imports {'.'.join(target)}"
            else:
                assert target[0] in allowed, f"{path} imports {'.'.join(target)}"


def test_kernels_do_not_know_the_trainer():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) tokenflex\b(?!_)", path.read_text(), re.MULTILINE), path
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"


def test_no_broad_except_and_no_silent_pass():
    for path in [
        *(ROOT / "tokenflex").rglob("*.py"),
        *(ROOT / "launch").glob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
    ]:
        assert not re.search(r"except( Exception| BaseException)?:\s*(#.*)?$", path.read_text(), re.MULTILINE), path


def test_every_module_says_why_it_exists():
    for path, _ in modules():
        assert ast.get_docstring(ast.parse(Path(path).read_text())), path
