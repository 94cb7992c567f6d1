"""Install cap_pretrain. The metadata are in pyproject.toml."""

from setuptools import setup

setup()
