"""Names the packages; everything else is in pyproject.toml. This folder itself is `rectiflow`, its folders the subpackages."""

from setuptools import find_packages, setup

ROOMS = find_packages(".", exclude=["tests", "tests.*", "bench", "bench.*"])

setup(packages=["rectiflow", *(f"rectiflow.{room}" for room in ROOMS)], package_dir={"rectiflow": "."})
