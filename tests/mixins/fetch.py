"""Fetches transformers' own test mixins, of the release that is installed, from its source distribution into build/.

They are imported as the package `transformers_tests`. What the source distribution leaves out (folders below its tests) stands
in as an empty mixin, so the generation mixin runs only where its file is put at build/transformers_tests/generation/test_utils.py.
"""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

BUILD = Path(__file__).parents[2] / "build"
PACKAGE = BUILD / "transformers_tests"
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def main():
    stamp = PACKAGE / "version"
    if stamp.exists() and stamp.read_text() == transformers.__version__:
        return
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = f"transformers=={transformers.__version__}"
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", source, "-d", BUILD / "sdist"], check=True)
    subprocess.run([*pip, "install", "--upgrade", "--target", BUILD / "test_packages", "parameterized"], check=True)
    with tarfile.open(BUILD / "sdist" / f"transformers-{transformers.__version__}.tar.gz") as archive:
        archive.extractall(BUILD / "sdist", filter="data")
    shutil.copytree(BUILD / "sdist" / f"transformers-{transformers.__version__}" / "tests", PACKAGE, dirs_exist_ok=True)
    for name, text in STAND_INS.items():
        path = PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        if not path.exists():
            path.write_text(text)
    (PACKAGE / "__init__.py").touch()
    stamp.write_text(transformers.__version__)


if __name__ == "__main__":
    main()
