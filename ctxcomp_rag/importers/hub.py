"""Where an official checkpoint is: a path here, or a name on the Hugging Face hub, fetched once into its cache."""

from __future__ import annotations

from pathlib import Path

from ctxcomp_rag.errors import InputError, ModelLoadError

PCC_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "memory_converter.bin", "pytorch_model.bin"]
"""What of a PCC repository is fetched; training states and plots are not."""


def resolve_file(source: str | Path, revision: str | None = None) -> Path:
    """A file here, or "OWNER/NAME/FILE" on the hub.

    Raises:
        InputError: a revision of a file that is here.
        ModelLoadError: neither here nor to be had from the hub; the message says why.
    """
    path, name = Path(source), str(source)
    if _is_here(path, revision):
        return path
    owner, repository, file = [*name.split("/", 2), "", ""][:3]
    if not file or not _may_be_hub_name(name):
        raise ModelLoadError(f"there is no file {name!r}; on the Hugging Face hub a file is named OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision))
    except (OSError, ValueError) as error:
        raise _unreachable(name, revision, error) from error


def resolve_folder(source: str | Path, revision: str | None = None) -> Path:
    """A folder here, or the repository "OWNER/NAME" on the hub. Raises as `resolve_file`."""
    path, name = Path(source), str(source)
    if _is_here(path, revision):
        return path
    if name.count("/") != 1 or not _may_be_hub_name(name):
        raise ModelLoadError(f"there is no folder {name!r}; on the Hugging Face hub a folder is named OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PCC_FILES))
    except (OSError, ValueError) as error:
        raise _unreachable(name, revision, error) from error


def _is_here(path: Path, revision: str | None) -> bool:
    if path.exists() and revision is not None:
        raise InputError(f"{str(path)!r} is here and has no revision {revision!r}; leave the revision out, or name a "
                         "repository on the hub")
    return path.exists()


def _may_be_hub_name(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and "\\" not in name and "//" not in name


def _unreachable(name: str, revision: str | None, error: Exception) -> ModelLoadError:
    said = str(error).strip().splitlines()
    at = f" at revision {revision!r}" if revision else ""
    return ModelLoadError(
        f"{name!r}{at} is not here and could not be fetched from the Hugging Face hub: "
        f"{said[0] if said else type(error).__name__} Check the spelling and the network; without network, download it "
        "elsewhere and pass its path"
    )
