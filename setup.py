"""Installs Hearken; csrc/ is built by csrc/build.py, see there.

The form of distribution is the checkout: `pip install --no-build-isolation -e .`
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

import build as csrc  # noqa: E402


class BuildExt(build_ext):
    """Hands the work to csrc/build.py, which leaves the libraries beside train/ops/*.py."""

    def run(self) -> None:
        built = csrc.build()
        if not (self.editable_mode or self.inplace):
            for library in built:
                target = Path(self.build_lib, library.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(library, target)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    name="hearken",
    version="0.1.0",
    description="Teaches a text LLM to listen: behaviour alignment of speech LLMs on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["train", "train.*", "data", "data.*", "examples", "examples.*"]
    ),
    package_dir={"": "."},
    ext_modules=[Extension("train.ops._cpu", [], py_limited_api=True)],
    cmdclass={"build_ext": BuildExt},
    install_requires=[
        "torch>=2.11,<2.12",
        "torchaudio>=2.11,<2.12",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.17,<6",
        "webdataset>=1.0",
        "mlflow>=3",
        "soundfile",
        "requests",
        "matplotlib",
        "accelerate",
        "peft",
        "jiwer",
        "sacrebleu",
        "scipy",
        "psutil",
        "pydantic>=2",
        "rich",
        "shtab",
        "pyyaml",
        "safetensors",
        "pyarrow",
        "ninja",
        "jinja2",
        "py3langid",
    ],
    extras_require={
        "dev": [
            "pytest",
            "hypothesis",
            "scikit-learn",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "clang-format",
            "pre-commit",
            "types-PyYAML",
            "transformers[serving]",
        ],
        "openai": ["openai>=1.98"],
        "ui": ["gradio>=6"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
        "browser": ["playwright"],
        "serve": ["fastapi", "uvicorn"],
        "micro": ["espeakng-loader"],
        "flash": ["flash-attn"],
        "int8": ["bitsandbytes>=0.46"],
    },
)
