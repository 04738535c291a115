"""Fetches transformers' own test mixins, of the release that is installed, into build/transformers_tests.

They are imported as the package `tests`, by which name they know each other. Most come from the source distribution on the package
index. The generation mixin and the exporters' are in transformers' repository alone: they are read from GitHub at the release's tag, or from
a checkout of the repository where one is named:

    python tests/mixins/fetch.py --checkout ~/transformers

What can be had from neither stands in as an empty mixin. What came from where is written to `sources.json`, which `report.py` prints.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import transformers

BUILD = Path(__file__).parents[2] / "build"
HOME = BUILD / "transformers_tests"
PACKAGE = HOME / "tests"
REPOSITORY = "https://raw.githubusercontent.com/huggingface/transformers/v{version}/tests/{name}"
TIMEOUT_S = 20
STAND_INS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin:\n    pass\n",
}
"""What the source distribution leaves out and the others import; the exporters' mixins are not run."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", default="", help="a checkout of transformers' repository")
    checkout = parser.parse_args().checkout
    version = transformers.__version__
    if not (HOME / "sources.json").exists() or sources()["release"] != version:
        fetch_distribution(version)
    came = sources()
    if came["generation"] == "nowhere" or checkout:
        came["generation"] = fetch_generation(version, checkout)
        (HOME / "sources.json").write_text(json.dumps(came))
    print(
        f"transformers {version}: mixins from its source distribution, the generation mixin from {came['generation']}"
    )


def sources():
    """{"release": of transformers, "generation": where its mixin came from}."""
    return json.loads((HOME / "sources.json").read_text())


def fetch_distribution(version):
    """The source distribution's tests, and empty mixins for what it leaves out."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = f"transformers=={version}"
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", source, "-d", BUILD / "sdist"], check=True)
    subprocess.run([*pip, "install", "--upgrade", "--target", BUILD / "test_packages", "parameterized"], check=True)
    with tarfile.open(BUILD / "sdist" / f"transformers-{version}.tar.gz") as archive:
        archive.extractall(BUILD / "sdist", filter="data")
    shutil.rmtree(HOME, ignore_errors=True)
    shutil.copytree(BUILD / "sdist" / f"transformers-{version}" / "tests", PACKAGE)
    (PACKAGE / "__init__.py").touch()
    for name, text in STAND_INS.items():
        put(name, text)
    (HOME / "sources.json").write_text(json.dumps({"release": version, "generation": "nowhere"}))


def fetch_generation(version, checkout):
    """Put the generation mixin in place; returns where it came from, "nowhere" where it could not be had."""
    name = "generation/test_utils.py"
    if checkout:
        folder = Path(checkout).expanduser()
        put(name, (folder / "tests" / name).read_text())
        said = (folder / "src" / "transformers" / "__init__.py").read_text()
        return f"a checkout at {re.search(r'__version__ = .(.+).$', said, re.MULTILINE)[1]}"
    try:
        with urllib.request.urlopen(REPOSITORY.format(version=version, name=name), timeout=TIMEOUT_S) as answer:
            put(name, answer.read().decode())
    except (urllib.error.URLError, TimeoutError) as error:
        print(
            f"the generation mixin cannot be had from GitHub ({error}); name a checkout with CHECKOUT=...",
            file=sys.stderr,
        )
        return "nowhere"
    return f"GitHub, v{version}"


def put(name, text):
    path = PACKAGE / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(text)


if __name__ == "__main__":
    main()
