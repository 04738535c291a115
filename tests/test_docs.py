"""The pages hold to the tree: links lead somewhere, paths and keys exist, generated tables are the generator's, versions agree."""

import importlib.util
import json
import re

import pytest
import yaml
from conftest import ROOT

import tokenflex

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs/decisions").glob("*.md"),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BUILT = ("reference/",)
"""Folders of pages that `make docs` writes."""


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path):
    heads = re.findall(r"(?m)^#+ (.+)$", without_code(path.read_text()))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(without_code(page.read_text())):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith(BUILT):
            continue
        path = page if not target else (page.parent / target).resolve()
        assert path.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_is_there(page):
    """Paths in backticks that begin at a folder of the project; the log is history."""
    if page.name == "log.md":
        return
    text = without_code(page.read_text())
    for path in re.findall(r"`((?:tokenflex|tests|launch|configs|slurm|examples|kernels|docs)/[\w./-]*)", text):
        name = path.rstrip(".")
        if name not in ("slurm/site.sh", "tokenflex/data/index"):  # a user's own; a folder, whatever it is called
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_reliability_table_is_the_generators():
    spec = importlib.util.spec_from_file_location("report", ROOT / "tests" / "reliability" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    page = (ROOT / "docs" / "reliability.md").read_text()
    figures = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    assert report.written(page, figures) == page
    assert "| new | some figure 3 |" in report.table({**figures, "new": {"some_figure": 3}}), (
        "a row without words is shown"
    )


def test_the_speed_table_is_the_records():
    folder = ROOT / "tests" / "benchmarks" / "train"
    spec = importlib.util.spec_from_file_location("train_speed_table", folder / "table.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    page, path = (ROOT / "docs" / "speed.md").read_text(), ROOT / "docs" / "results" / "train-speed.json"
    assert bench.written(page, json.loads(path.read_text()) if path.exists() else {}) == page
    row = {
        "model": "m",
        "workload": "w",
        "arms": {"p": {"tokens_per_s": [3, 1, 2]}, "ours": {"tokens_per_s": [4, 6, 5]}},
    }
    record = {"machine": {"device": "d", "threads": 2}, "date": "t", "turns": 3, "left_out": [], "rows": [row]}
    assert "| m | w | p | 2 | 1 to 3 | 2.50 |" in bench.table(record)


def test_the_table_of_sides_is_the_records():
    spec = importlib.util.spec_from_file_location("wide_pages", ROOT / "tests" / "benchmarks" / "wide_pages.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    record = json.loads(bench.RECORD.read_text()) if bench.RECORD.exists() else {}
    assert bench.written(bench.PAGE.read_text(), record) == bench.PAGE.read_text()
    runs = {
        str(seed): {task: dict.fromkeys(map(str, bench.COUNTS), 0.5 + seed / 10) for task in bench.TASKS}
        for seed in (0, 1)
    }
    some = {"date": "t", "steps": 1, "pages": 2, "questions": 3, "accuracy": {"square": runs, "aspect": runs}}
    assert bench.table(some).count("55.0 (50.0 to 60.0)") == len(bench.TASKS) * 2 * len(bench.COUNTS)


def test_decisions_are_numbered_once_and_listed():
    folder = ROOT / "docs" / "decisions"
    records = sorted(path.name for path in folder.glob("0*.md"))
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))
    listed = re.findall(r"\((0[\w.-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == records
    for name in records:
        assert (folder / name).read_text().startswith(f"# {int(name[:4])}. "), name


def test_the_log_is_newest_first():
    days = re.findall(r"(?m)^## (\d{4}-\d{2}-\d{2})", (ROOT / "docs" / "log.md").read_text())
    assert days == sorted(days, reverse=True) and days


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tokenflex.__version__
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (hook["rev"] for hook in hooks if hook["repo"].endswith("ruff-pre-commit"))
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_folder_with_code_is_a_package():
    """What lacks an `__init__.py` is left out of a wheel."""
    for path in (ROOT / "tokenflex").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path.parent
    for package in ("tokenflex", "kernels/tokenflex_kernels"):
        assert (ROOT / package / "py.typed").exists()


def test_workflow_and_forms_are_valid():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    supported = re.search(r'requires-python = ">=3.(\d+),<3.(\d+)"', (ROOT / "pyproject.toml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{supported[1]}", f"3.{int(supported[2]) - 1}"]
