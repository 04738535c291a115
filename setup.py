"""Which folders are packages; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["tokenflex", "tokenflex.*"]) + find_packages("kernels"),
    # The folder `kernels` is no package: Hugging Face ships one of that name, which transformers imports.
    package_dir={"tokenflex_kernels": "kernels/tokenflex_kernels"},
    package_data={"tokenflex": ["py.typed"], "tokenflex_kernels": ["py.typed"]},
)
