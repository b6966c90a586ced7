"""What pyproject.toml can't say: the folder `configs` of a checkout becomes part of the installed package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["deco_jax", "deco_jax.*"]), "deco_jax.configs"],
    package_dir={"deco_jax.configs": "configs"},
)
