"""Packaging: what is installed, and what it needs."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "prompt_tuning_jax" / "__init__.py").read_text(), re.MULTILINE)


def description() -> str:
    """Returns the README as a package index shows it, where no file lies beside it.

    Paths become addresses below the environment's REPOSITORY_URL, https://github.com/OWNER/NAME. Without it, links
    become plain text, and pictures are left out.
    """
    if not README.exists():
        return ""
    repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")

    def absolute(link: re.Match) -> str:
        picture, text, path = link.groups()
        if re.match(r"https?://|#", path):
            return link[0]
        if repository:
            return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{path})"
        return "" if picture else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, README.read_text(encoding="utf-8"))


# Lower bounds are the releases this was written and tested with. Upper bounds stop below the next release that may
# break: the next major one, or for 0.x packages the next minor one.
JAX = ">=0.10.2,<0.12"
TRANSFORMERS = "transformers>=5.23,<6"
PEFT = "peft>=0.21.2,<0.22"  # 0.21.0 calls what transformers 5.23 has renamed

INSTALL_REQUIRES = [
    f"jax{JAX}",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "importlib_resources>=6,<8",  # which tensorflow-datasets 4.9.10 imports and does not ask for
    "grain>=0.2.18,<0.3",
    "numpy>=2.4,<3",
    "jaxtyping>=0.3.11,<0.4",
    # Tasks and preprocessing.
    "seqio>=0.0.20,<0.1",
    "tensorflow>=2.21,<3",
    "tensorflow-text>=2.21,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "sentencepiece>=0.2.3,<0.3",
    "tokenizers>=0.23.3,<0.24",
    "protobuf>=6,<8",  # in which sentencepiece's models are written
    "rouge-score>=0.1.2,<0.2",
    # Base models and prompts in and out.
    "huggingface_hub>=2.4,<3",
    "safetensors>=0.8,<0.9",
    "tensorstore>=0.1.86,<0.2",
    # Command lines, logs and plots.
    "gin-config>=0.5,<0.6",
    "PyYAML>=6.0.3,<7",  # Kubernetes manifests
    "matplotlib>=3.11,<4",
    "tensorboardX>=2.6.5,<3",  # writes TensorBoard events without TensorFlow
    "tqdm>=4.70,<5",
]

SLURM = ["submitit>=1.5.4,<2"]
SERVE = ["prometheus-client>=0.26,<0.27", "starlette>=1.10,<2", "uvicorn>=0.54,<0.55"]

EXTRAS_REQUIRE = {
    "hf": [TRANSFORMERS, PEFT, "torch>=2.13,<3"],
    "serve": SERVE,
    "slurm": SLURM,
    "tpu": [f"jax[tpu]{JAX}"],
    "gpu": [f"jax[cuda13]{JAX}"],
    # T5X is not on PyPI, and its own requirements ask for the development heads of Flax and SeqIO. This extra brings
    # what else it imports; docs/guides/t5x.md has the line that brings T5X and two more repositories, --no-deps.
    "t5x": ["cached-property>=2,<3", "clu>=0.0.12,<0.1", "fiddle>=0.3,<0.4", "tensorboard>=2.21,<3"],
    "test": [
        "pytest>=9.2,<10",
        "pytest-timeout>=2.4,<3",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.170,<7",
        "beartype>=0.23.1,<0.24",
        "scikit-learn>=1.9,<2",
        "scipy>=1.17,<2",
        "torch==2.13.0",
        TRANSFORMERS,
        PEFT,
        "jsonschema>=4.26,<5",
        *SLURM,
        *SERVE,
    ],
    "docs": ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.7,<10", "mkdocstrings-python>=2,<3"],
    # Exact, so that the same tree always lints the same; `nodejs` brings pyright's Node.js from PyPI.
    "lint": ["ruff==0.17.6", "pyright[nodejs]==1.1.414", "import-linter==2.16"],
}

setup(
    name="prompt_tuning_jax",
    version=VERSION.group(1),
    description="T5 prompt tuning (Lester et al. 2021) in JAX and Flax",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    # gin_configs/ stands at the top of the source tree and inside the package once installed.
    packages=[*find_packages(include=["prompt_tuning_jax", "prompt_tuning_jax.*"]), "prompt_tuning_jax.gin_configs"],
    package_dir={"prompt_tuning_jax": "prompt_tuning_jax", "prompt_tuning_jax.gin_configs": "gin_configs"},
    package_data={
        "prompt_tuning_jax": ["py.typed", "bases/**/*"],
        "prompt_tuning_jax.gin_configs": ["**/*.gin"],
    },
    entry_points={"console_scripts": ["prompt-tuning = prompt_tuning_jax.__main__:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
