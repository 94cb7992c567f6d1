"""Installs cap_pretrain. Ranges are those the test suite was run with."""

from setuptools import find_packages, setup

setup(
    name="cap_pretrain",
    version="0.1.0",
    description="Pretraining vision encoders by captioning, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cap_pretrain", "cap_pretrain.*"]),
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "ml_collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "dm-pix>=0.4.5,<0.5",
        "simplejpeg>=1.9,<2",
        "sentencepiece>=0.2.1,<0.3",
        "safetensors>=0.5,<1",
        "grain>=0.2.15,<0.3",
        "array-record>=0.8.3,<0.9",
        "tensorflow-datasets>=4.9.10,<4.10",
        "tensorboardX>=2.6,<3",
        "opencv-python-headless>=4.10,<6",
        "Pillow>=11,<14",
        "numpy>=2.0,<3",
        "fsspec>=2025.9,<2027",
        "scipy>=1.14,<2",
        "pyarrow>=16,<27",
        "absl-py>=2.1,<3",
        "etils>=1.13,<2",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "test": [
            *("pytest>=8,<10", "pytest-xdist>=3.6,<4", "ruff>=0.14,<0.18"),
            *("torch==2.13.0", "transformers>=5.23,<6"),
            *("scikit-learn>=1.6,<2", "scikit-image>=0.25,<0.27", "pycocoevalcap>=1.2,<1.3"),
            "matplotlib>=3.11,<4",
            # The TPU compiler, of the version that goes with JAX; there are wheels for this only.
            "jax[tpu]>=0.10.2,<0.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
        "plots": ["matplotlib>=3.11,<4", "scikit-learn>=1.6,<2"],
        "captions": ["pycocoevalcap>=1.2,<1.3"],
        "beam": ["apache-beam>=2.77,<3"],
        "torch": ["torch>=2.6"],
        # What tools/bench_data.py compares with; nothing else imports TensorFlow.
        "bench": ["torch>=2.6", "tensorflow-cpu>=2.21,<2.22"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
    },
)
