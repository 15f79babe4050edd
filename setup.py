"""Packaging of dsft. The configs of `configs/` travel inside the wheel as `launcher/_data/configs`."""

import re
from pathlib import Path
from shutil import copytree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "launcher/__init__.py").read_text())[1]


class BuildWithConfigs(build_py):
    """Copies the starter configs below `launcher`: a top-level `configs` could meet any project's own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout reads its own configs/ (launcher/resources.py)
            copytree(HERE / "configs", Path(self.build_lib, "launcher/_data/configs"), dirs_exist_ok=True)


# Lower bounds: the oldest versions with the interfaces dsft uses. The tests run with those of constraints.txt.
setup(
    name="dsft",
    version=VERSION,
    description="One JSON config becomes DeepSpeed ZeRO-3 fine-tuning jobs, and is seen through to the end",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["launcher*", "slurm*", "trainer*"]),
    package_data={"": ["*.json", "*.html", "*.sbatch"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["dsft = launcher.cli:main"]},
    install_requires=[
        "accelerate>=1.1.0",  # transformers asks for it before it builds a model under ZeRO-3
        "aiohttp>=3.10",  # fsspec's https://
        "datasets>=5.0",
        "deepspeed>=0.19.6",  # managed_gradient_accumulation
        "fsspec>=2024.6",
        "jinja2>=3.1",
        "numpy>=2.0",
        "optuna>=5.0",
        "peft>=0.18",
        "pillow>=11.0",
        "protobuf>=5.0",  # sentencepiece reads its models by it
        "pyarrow>=18.0",
        "pydantic>=2.10",
        "rich>=14.0",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.5",
        "safetensors>=0.6",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "sentencepiece>=0.2.1",
        "seqeval>=1.2.2",
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "torch>=2.11",
        "transformers>=5.0",
        "xxhash>=3.5",
    ],
    extras_require={
        "test": [
            "bitsandbytes>=0.46",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "mypy>=1.18",
            "pytest>=9.0",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "setuptools>=77",
            "torchao>=0.15",
            "wheel>=0.45",
        ],
        "gpu": ["liger-kernel>=0.8"],
        "qlora": ["bitsandbytes>=0.46"],  # 4-bit kernels, on CPUs as well; a wheel of 43 MB
        "fp8": ["torchao>=0.15"],
        "vision": ["num2words>=0.5", "torchvision"],  # of some processors; torchvision goes by torch
        "flash": ["flash-attn>=2.7"],  # built from source, against the torch at hand
    },
)
