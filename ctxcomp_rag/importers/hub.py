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
    found = _fetch(f"{owner}/{repository}", revision, [file]) / file
    if not found.exists():
        raise ModelLoadError(f"the repository {owner}/{repository} on the Hugging Face hub has no file {file!r}"
                             f"{_at(revision)}; check the spelling")
    return found


def resolve_folder(source: str | Path, revision: str | None = None) -> Path:
    """A folder here, or the repository "OWNER/NAME" on the hub. Raises as `resolve_file`."""
    path, name = Path(source), str(source)
    if _is_here(path, revision):
        return path
    if name.count("/") != 1 or not _may_be_hub_name(name):
        raise ModelLoadError(f"there is no folder {name!r}; on the Hugging Face hub a folder is named OWNER/NAME")
    return _fetch(name, revision, PCC_FILES)


def _fetch(repository: str, revision: str | None, files: list[str]) -> Path:
    """The folder of a repository in the hub's cache, with these files in it as far as the repository has them."""
    from huggingface_hub import snapshot_download

    try:  # not hf_hub_download, which tries for half a minute where there is no network
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()
        raise ModelLoadError(
            f"{repository!r}{_at(revision)} is not here and could not be fetched from the Hugging Face hub "
            f"({said[0] if said else type(error).__name__}). Check the spelling and the network; without network, "
            "download it elsewhere and pass its path"
        ) from error


def _at(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision else ""


def _is_here(path: Path, revision: str | None) -> bool:
    if path.exists() and revision is not None:
        raise InputError(f"{str(path)!r} is here and has no revision {revision!r}; leave the revision out, or name a "
                         "repository on the hub")
    return path.exists()


def _may_be_hub_name(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and "\\" not in name and "//" not in name
