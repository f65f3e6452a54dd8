"""What pyproject.toml cannot say: the C++ sources install as smart_fast.csrc where there are any."""

from pathlib import Path

from setuptools import setup

packages = ["smart_fast", "smart_fast.backends", "smart_fast.kernels"]
if (Path(__file__).resolve().parent / "csrc").is_dir():
    packages.append("smart_fast.csrc")

setup(packages=packages)
