"""Runs tests against another pair of torch and transformers than the pinned one, in an environment of its own.

    python tests/versions.py --torch 2.15.0 --transformers 5.24.0                 the CPU suite
    python tests/versions.py --torch 2.15.0 --transformers 5.24.0 tests/model     arguments are pytest's

The environment is build/versions/torch-A-transformers-B and stays for the next time. Everything else is what `constraints.txt` pins, but for
what those two bring themselves. The bounds in pyproject.toml are not asked: this is how they are found.
"""

import argparse
import re
import subprocess
import sys
import venv
from pathlib import Path

if sys.version_info < (3, 11):
    from pip._vendor import tomli as tomllib
else:
    import tomllib

ROOT = Path(__file__).parents[1]
THEIRS = {"torch", "transformers", "tokenizers", "huggingface-hub", "triton"}
"""What is chosen here, and what comes with the choice."""
SUITE = ["-m", "not gpu and not multi_gpu and not slurm and not slow", "-n", "2", "--dist", "loadfile"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="release, such as 2.15.0")
    parser.add_argument("--transformers", required=True, help="release, such as 5.24.0")
    arguments, rest = parser.parse_known_args()
    chosen = {"torch": arguments.torch, "transformers": arguments.transformers}
    home = ROOT / "build" / "versions" / "-".join(f"{name}-{release}" for name, release in chosen.items())
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        install(home, python, chosen)
    said = "import torch, transformers; print(f'torch {torch.__version__}, transformers {transformers.__version__}', flush=True)"
    subprocess.run([python, "-c", said], check=True, cwd=home)
    return subprocess.run([python, "-m", "pytest", *(rest or SUITE)], cwd=ROOT).returncode


def install(home, python, chosen):
    """An environment with the chosen releases and, for the rest, the pinned ones."""
    venv.create(home, with_pip=True, clear=True)
    constraints = home / "constraints.txt"
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if name_of(line) not in THEIRS]
    constraints.write_text("\n".join([*pins, *(f"{name}=={release}" for name, release in chosen.items())]) + "\n")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    wanted = [line for line in requirements() if name_of(line) not in THEIRS - {"triton"}]
    subprocess.run([*pip, "--constraint", constraints, *(f"{n}=={r}" for n, r in chosen.items()), *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    (home / "installed").touch()


def requirements():
    """What the project and its tests need, from pyproject.toml; Triton without its bound, which follows torch's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(
            line
            for name in ("quickstart", "mpi", "parquet", "tensorboard", "serve", "video", "dev")
            for line in extras[name]
        ),
    ]
    return [line if name_of(line) != "triton" else "triton" for line in wanted]


def name_of(requirement):
    """The package of a requirement, in the spelling of the index."""
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
