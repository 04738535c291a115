"""The documentation site: `make docs` builds it from docs/*.md and the docstrings into build/docs; a warning is an error."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tokenflex import __version__  # noqa: E402

project = "TokenFLEX"
author = "the maintainers of this trainer"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results"]
highlight_language = "text"  # blocks that name no language are shells and drawings
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "TokenFLEX"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

add_module_names = False  # the headings say where
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["deepspeed", "mpi4py"]  # slow to import, and nothing of theirs is documented
python_use_unqualified_type_names = True

ROOMS = (
    ("Names, errors, files", ("layout", "errors", "files", "failpoints")),
    ("Configuration", ("budget", "config")),
    ("Planning", ("plan",)),
    ("Data", ("data",)),
    ("Model", ("model",)),
    ("Ranks and engine", ("parallel",)),
    ("Checkpoints", ("checkpoint",)),
    ("Training", ("train",)),
    ("Before a run", ("estimate", "doctor")),
    ("Preparing data", ("prepare",)),
    ("The quick start's corpus", ("corpus",)),
    ("Telemetry and reports", ("telemetry",)),
    ("Evaluation, inference, export", ("evaluate", "infer", "export", "router")),
    ("Command lines and jobs", ("cli", "slurm")),
)


def modules_of(room: str) -> list[str]:
    """Dotted names of a room's modules, the package first."""
    place = ROOT / "tokenflex" / room
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(name for name in names if not name.endswith("__main__"))


def reference_page(title: str, rooms: tuple[str, ...]) -> str:
    """The Markdown of one page of the reference: every module with its public names."""
    lines = [f"# {title}", ""]
    for name in (name for room in rooms for name in modules_of(room)):
        is_package = (ROOT / Path(*name.split("."))).is_dir()  # what a package offers is shown where it is defined
        options = "" if is_package else "\n   :members:"
        lines += [f"## `{name}`", "", "```{eval-rst}", f".. automodule:: {name}{options}", "```", ""]
    return "\n".join(lines)


def configuration_page() -> str:
    """The Markdown of every key of a recipe, with its default."""
    from tokenflex.config import describe

    lines = [
        "# Configuration keys",
        "",
        "Every key of a recipe, with its default. `launch/train.py --help` prints the same.",
        "",
    ]
    section = None
    for key, default, text in re.findall(
        r"^  ([\w.]+)=(.*)\n((?:(?!  [\w.]+=).*\n?)+)", describe() + "\n", re.MULTILINE
    ):
        head = key.split(".")[0] if "." in key else "run"
        if head != section:
            section = head
            lines += [f"## {section}", ""]
        default = default if default == "(must be given)" else f"`{default}`"
        lines += [f"`{key}` = {default}", f": {' '.join(text.split())}", ""]
    return "\n".join(lines)


def write_reference(app) -> None:
    """Write the pages that are made from the code: docs/reference/ is not under version control."""
    folder = ROOT / "docs" / "reference"
    folder.mkdir(exist_ok=True)
    pages = {re.sub(r"\W+", "-", title.lower()).strip("-"): reference_page(title, rooms) for title, rooms in ROOMS}
    options = ".. automodule:: tokenflex_kernels\n   :members:\n   :imported-members:"
    pages["kernels"] = f"# Kernels\n\n```{{eval-rst}}\n{options}\n```\n"
    pages["configuration"] = configuration_page()
    toc = "\n".join(sorted(pages, key=list(pages).index))
    pages["index"] = (
        "# Reference\n\nPublic names by room, from their docstrings. [Architecture](../architecture.md) says what each room is "
        f"for.\n\n```{{toctree}}\n:maxdepth: 1\n\n{toc}\n```\n"
    )
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.stem not in pages:
            path.unlink()


CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)(\w*)")
"""Docstrings mark code as Markdown does, with single backticks, and may go on behind them: `Slice`s."""


def as_restructured_text(app, what, name, obj, options, lines) -> None:
    """Docstrings in place, with code marked as Sphinx wants it and nothing else taken for markup."""
    kept = []

    def keep(match):
        kept.append(f"``{match[1]}``" + (f"\\ {match[2]}" if match[2] else ""))
        return f"\x00{len(kept) - 1}\x00"

    text = re.sub(r"``[^`]+``", lambda match: kept.append(match[0]) or f"\x00{len(kept) - 1}\x00", "\n".join(lines))
    text = CODE.sub(keep, text)
    text = re.sub(r"([*|])", r"\\\1", text)
    text = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", text)
    lines[:] = re.sub("\x00(\\d+)\x00", lambda match: kept[int(match[1])], text).split("\n")


def is_skipped(app, what, name, obj, skip, options) -> bool | None:
    """Fields of named tuples that say no more than that they are fields."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app) -> None:
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-skip-member", is_skipped)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon
