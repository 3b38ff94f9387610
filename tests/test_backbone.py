"""Loading a decoder, freezing it, sharing its weights, and saying exactly which one it is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CohereConfig, PreTrainedModel, SmolLM3Config, T5Config, T5ForConditionalGeneration

from ctxcomp_rag.backbone import Backbone, load_frozen, weights_digest
from ctxcomp_rag.errors import ModelLoadError, UnsupportedModelError
from tests.tiny_models import (
    ARCHITECTURES,
    FULL_ATTENTION_ROPE,
    save_tiny,
    tiny_backbone,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

IDS = torch.tensor([[285, 84, 71, 256, 12, 200, 33, 99, 4, 257]])


def logits(model: torch.nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS}), attention_mask=torch.ones_like(IDS)).logits


def with_adapter(backbone: Backbone) -> PreTrainedModel:
    """A second tree whose LoRA changes every linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(backbone.second_tree(), lora).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ARCHITECTURES)
class TestEveryArchitecture:
    def test_loads_from_a_folder_and_is_frozen(self, name: str, tmp_path: Path) -> None:
        loaded = load_frozen(save_tiny(name, tmp_path), device="cpu")
        assert not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert logits(loaded.model).equal(logits(tiny_backbone(name).model))
        assert loaded.tokenizer.encode("the end") == tiny_backbone(name).tokenizer.encode("the end")
        assert loaded.fingerprint.weights_digest == tiny_backbone(name).fingerprint.weights_digest

    def test_embedded_rows_are_those_the_model_makes_of_ids(self, name: str) -> None:
        """Also where the architecture scales its embeddings (Gemma)."""
        backbone = tiny_backbone(name)
        through_rows = logits(backbone.model, inputs_embeds=backbone.embed(IDS))
        torch.testing.assert_close(through_rows, logits(backbone.model), atol=1e-6, rtol=0)

    def test_released_it_keeps_its_name_and_embeddings_only(self, name: str, tmp_path: Path) -> None:
        backbone, whole = load_frozen(save_tiny(name, tmp_path), device="cpu"), tiny_backbone(name)
        backbone.release_layers()
        assert backbone.fingerprint.weights_digest == whole.fingerprint.weights_digest
        assert (backbone.device.type, backbone.dtype) == ("cpu", whole.dtype)
        assert backbone.embed(IDS).equal(whole.embed(IDS))
        held = [n for n, p in backbone.model.named_parameters() if p.device.type != "meta"]
        assert len(held) == 1
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            logits(backbone.model)

    def test_second_tree_is_other_modules_over_the_same_storage(self, name: str) -> None:
        backbone = tiny_backbone(name)
        tree = backbone.second_tree()
        assert not set(map(id, tree.modules())) & set(map(id, backbone.model.modules()))
        for kind in ("named_parameters", "named_buffers"):
            first, second = (dict(getattr(m, kind)()) for m in (backbone.model, tree))
            assert first.keys() == second.keys()
            assert all(first[n].data_ptr() == second[n].data_ptr() for n in first)

    def test_adapter_on_the_second_tree_never_reaches_the_decoder(self, name: str) -> None:
        backbone = tiny_backbone(name)
        before, digest = logits(backbone.model), weights_digest(backbone.model)
        adapted = with_adapter(backbone)
        assert (logits(adapted) - before).abs().max() > 0.1
        assert logits(backbone.model).equal(before)
        assert weights_digest(backbone.model) == digest

    def test_two_threads_do_not_disturb_each_other(self, name: str) -> None:
        """One encodes through LoRA while the other decodes; the results are those of a single thread, bit for bit."""
        backbone = tiny_backbone(name)
        encoder = with_adapter(backbone)
        with ThreadPoolExecutor(2) as pool:
            # one after the other, but in the pool: another thread may split its sums over another number of cores
            expected = [pool.submit(logits, model).result() for model in (encoder, backbone.model)]
            for _ in range(60):
                both = [pool.submit(logits, model) for model in (encoder, backbone.model)]
                assert all(f.result().equal(e) for f, e in zip(both, expected, strict=True))

    def test_sizes_are_those_of_the_cache(self, name: str) -> None:
        backbone = tiny_backbone(name)
        with torch.no_grad():
            cache = backbone.model(input_ids=IDS, use_cache=True).past_key_values
        layers, (_, heads, _, head_dim) = len(cache.layers), cache.layers[0].keys.shape
        stated = backbone.fingerprint
        assert (stated.num_layers, stated.num_kv_heads, stated.head_dim) == (layers, heads, head_dim)
        assert stated.hidden_size == backbone.embed(IDS).shape[-1]


@pytest.mark.parametrize("name", FULL_ATTENTION_ROPE)
def test_keys_can_be_moved(name: str) -> None:
    assert tiny_backbone(name).rope.rotary_dim == tiny_backbone(name).head_dim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_a_half_precision_decoder_can_be_moved(dtype: torch.dtype) -> None:
    assert Backbone(tiny_model(tiny_config("llama")).to(dtype), None, model_id="m").rope.rotary_dim == 8


SMALL = {"vocab_size": 289, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}


@pytest.mark.parametrize("config", [CohereConfig(**SMALL), SmolLM3Config(**SMALL, no_rope_layer_interval=2)],
                         ids=["neighbouring pairs", "layers without positions"])
def test_rotation_that_differs_from_the_configuration_is_found_out(config: CohereConfig | SmolLM3Config) -> None:
    backbone = Backbone(tiny_model(config), None, model_id="m")
    with pytest.raises(UnsupportedModelError, match=r"miss the model's own keys by \d+%"):
        backbone.rope  # noqa: B018


def test_cpu_gets_float32_unless_told_otherwise(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_frozen(tmp_path, device="cpu").dtype == torch.float32
    assert load_frozen(tmp_path, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def flip_one_bit(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[0, 0] ^= 1
    return model


def other_template() -> object:
    tokenizer = type(tiny_tokenizer())(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def llama(**overrides: object) -> PreTrainedModel:
    return tiny_model(tiny_config("llama", **overrides))


@pytest.mark.parametrize(("change", "fields"), [
    (lambda: Backbone(flip_one_bit(llama()), tiny_tokenizer(), model_id="m"), ["weights_digest"]),
    (lambda: Backbone(llama(), other_template(), model_id="m"), ["tokenizer_digest"]),
    (lambda: Backbone(llama(), None, model_id="m"), ["tokenizer_digest"]),
    (lambda: Backbone(llama(rope_theta=5e5), tiny_tokenizer(), model_id="m"), ["rope"]),
    (lambda: Backbone(llama().to(torch.bfloat16), tiny_tokenizer(), model_id="m"), ["weights_digest", "dtype"]),
    (lambda: Backbone(llama(), tiny_tokenizer(), model_id="renamed", revision="main"), []),
])
def test_fingerprint_tells_decoders_apart(change: Callable[[], Backbone], fields: list[str]) -> None:
    assert tiny_backbone("llama").fingerprint.differences(change().fingerprint) == fields


def test_digest_covers_stored_buffers_and_scalars() -> None:
    def with_buffer(value: float) -> PreTrainedModel:
        model = llama()
        model.register_buffer("layer_scalar", torch.tensor(value))
        return model

    assert weights_digest(with_buffer(1.0)) == weights_digest(with_buffer(1.0))
    assert len({weights_digest(m) for m in (llama(), with_buffer(1.0), with_buffer(2.0))}) == 3


def test_model_without_a_tokenizer_can_be_loaded_but_not_given_text(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    backbone = load_frozen(tmp_path, device="cpu")
    assert backbone.fingerprint.tokenizer_digest == ""
    with pytest.raises(ModelLoadError, match="was loaded without a tokenizer; pass token ids"):
        backbone.tokenizer  # noqa: B018


def test_unknown_model_without_network() -> None:
    with pytest.raises(ModelLoadError, match=r"'no-such-org/no-such-model' is neither a folder here nor a model that "
                                             r"could be fetched .* without network, download the model elsewhere"):
        load_frozen("no-such-org/no-such-model")


def test_folder_without_a_causal_language_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not hold a causal language model that can be loaded"):
        load_frozen(tmp_path)
    T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=16)
                               ).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="does not hold a causal language model that can be loaded"):
        load_frozen(tmp_path)


def test_weights_without_the_output_layer_are_not_filled_with_random_numbers(tmp_path: Path) -> None:
    llama().model.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"its weights lack lm_head\.weight"):
        load_frozen(tmp_path, device="cpu")


@pytest.mark.parametrize(("file", "match"), [
    ("model.safetensors", "does not hold a causal language model that can be loaded"),
    ("tokenizer.json", "the tokenizer of .* cannot be loaded"),
])
def test_damaged_file_is_reported(file: str, match: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match=match):
        load_frozen(tmp_path, device="cpu")
