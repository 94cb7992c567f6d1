"""Install cap_pretrain, with the files of configs/ as cap_pretrain/configs. See pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cap_pretrain", "cap_pretrain.*"]),
        "cap_pretrain.configs",
        "cap_pretrain.configs.sweeps",
    ],
    package_dir={"cap_pretrain.configs": "configs"},
)
