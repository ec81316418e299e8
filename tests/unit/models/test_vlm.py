from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from dpa.errors import DataError, ModelError
from dpa.models import vlm as vlm_module
from dpa.models.digest import digest_of_llm, digest_of_model, digest_of_part
from dpa.models.families import family_of, text_rules
from dpa.models.legacy import write_mm_projector
from dpa.models.lora import attach_lora, save_adapter
from dpa.models.parts import image_tokens_of, load_llm, load_tokenizer, load_tower
from dpa.models.settings import LoraSettings, ModelSettings
from dpa.models.vlm import build_vlm, head, hidden_states, image_features
from dpa.testing.models import MODEL_TYPES, tiny_batch, tiny_llava
from dpa.testing.parts import TINY_FAMILIES, write_tiny_llm
from dpa.types import Batch

Make = Callable[..., ModelSettings]
TIED = ("lab", "qwen3", "smollm2", "gemma2", "gemma3", "phi4_mini")
STRUCTURES = [
    "bos image label:5 text:2 label:3",
    "text:3 image text:1 label:2",
    "text:4 label:6",
    "image image label:2",
]


def logits_of_transformers(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        use_cache=False,
    )
    logits: torch.Tensor = output.logits
    return logits


class TestForward:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_is_transformers_own(self, model_type: str) -> None:
        model, batch = tiny_llava(model_type), tiny_batch(STRUCTURES)
        weight, _ = head(model)
        with torch.no_grad():
            ours = hidden_states(model, batch) @ weight.T
            theirs = logits_of_transformers(model, batch)
        real = batch.attention_mask.bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)

    def test_images_matter(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(STRUCTURES)
        assert batch.pixel_values is not None
        with torch.no_grad():
            seen = hidden_states(model, batch)
            other = hidden_states(model, replace(batch, pixel_values=batch.pixel_values.flip(0)))
        changed = (seen - other).abs().amax(dim=(1, 2)) > 1e-3
        assert changed.tolist() == [True, True, False, True], "only samples with an image change"

    def test_features_can_be_given(self) -> None:
        model, batch = tiny_llava("llama"), tiny_batch(STRUCTURES)
        assert batch.pixel_values is not None
        with torch.no_grad():
            features = image_features(model, batch.pixel_values)
            given = hidden_states(model, replace(batch, pixel_values=None), features=features)
            assert torch.equal(given, hidden_states(model, batch))

    def test_placeholders_may_hold_any_id(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(STRUCTURES)
        other = batch.input_ids.masked_fill(batch.is_image, 7)
        with torch.no_grad():
            assert torch.equal(hidden_states(model, replace(batch, input_ids=other)), hidden_states(model, batch))

    def test_gemmas_scaling_leaves_image_features_alone(self) -> None:
        """Gemma-2 multiplies embeddings by sqrt(hidden); earlier transformers did so after the splice."""
        model, batch = tiny_llava("gemma2"), tiny_batch(["image label:3"])
        assert batch.pixel_values is not None
        seen: list[torch.Tensor] = []
        body = model.model.language_model
        handle = body.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            hidden_states(model, batch)
            features = image_features(model, batch.pixel_values)
            embedded = body.embed_tokens.weight[batch.input_ids[0, 4:]] * 32**0.5
        handle.remove()
        assert torch.equal(seen[0][0, :4], features[0])
        torch.testing.assert_close(seen[0][0, 4:], embedded)

    def test_gradients_reach_connector_and_llm_but_not_the_tower(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(STRUCTURES)
        hidden_states(model, batch)[batch.supervised].square().sum().backward()
        touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert {name for name in touched if "vision_tower" in name} == set()
        assert {name for name, _ in model.named_parameters() if "projector" in name} <= touched
        assert "model.language_model.embed_tokens.weight" in touched

    def test_counts_that_do_not_match(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(STRUCTURES)
        assert batch.pixel_values is not None
        with pytest.raises(DataError) as caught:
            hidden_states(model, replace(batch, pixel_values=batch.pixel_values[:-1]))
        message = str(caught.value)
        assert "16 image placeholders but 12 image rows" in message
        assert "sample-3: 8 placeholders for 2 images" in message
        assert "sample-2" not in message

    def test_placeholders_without_images(self) -> None:
        with pytest.raises(DataError, match="but 0 image rows"):
            hidden_states(tiny_llava("qwen2"), replace(tiny_batch(STRUCTURES), pixel_values=None))

    def test_images_for_an_llm(self, settings: Make) -> None:
        llm = load_llm(settings("qwen2"), dtype=torch.float32)
        with pytest.raises(ModelError, match="sample-0"):
            hidden_states(llm, tiny_batch(["image label:2"]))

    @pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma2", "mistral"])
    def test_llm_alone_with_soft_cap(self, settings: Make, family: str) -> None:
        llm, batch = load_llm(settings(family), dtype=torch.float32), tiny_batch(["text:2 label:6", "label:4"])
        weight, cap = head(llm)
        with torch.no_grad():
            logits = hidden_states(llm, batch) @ weight.T
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            theirs = llm(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
            ).logits
        assert (cap is not None) == (family == "gemma2")
        real = batch.attention_mask.bool()
        torch.testing.assert_close(logits[real], theirs[real], rtol=0, atol=1e-5)

    def test_adapter_is_seen(self, settings: Make) -> None:
        llm, batch = load_llm(settings("qwen2"), dtype=torch.float32), tiny_batch(["text:2 label:6"])
        with torch.no_grad():
            before = hidden_states(llm, batch)
            proxy = attach_lora(llm, LoraSettings(rank=4, alpha=8), seed=0)
            assert torch.equal(hidden_states(proxy, batch), before)
            for name, parameter in proxy.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
            assert not torch.allclose(hidden_states(proxy, batch), before, atol=1e-3)
            assert head(proxy)[0] is head(llm)[0]


class TestImageFeatures:
    @pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
    @pytest.mark.parametrize("layer", [-2, -1, 1])
    def test_is_transformers_own(self, settings: Make, tower: str, layer: int) -> None:
        model = build_vlm(settings("qwen2", tower, vision_feature_layer=layer)).model
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = image_features(model, pixels)
            theirs = torch.stack(list(model.get_image_features(pixels).pooler_output))
        assert ours.shape == (2, 16, 32)
        assert torch.equal(ours, theirs)

    def test_low_precision_tower(self, settings: Make) -> None:
        model = build_vlm(settings(), tower_dtype=torch.bfloat16).model
        features = image_features(model, torch.zeros(1, 3, 16, 16))
        assert features.dtype == torch.float32
        assert features.requires_grad


class TestBuild:
    @pytest.mark.parametrize("family", TINY_FAMILIES)
    @pytest.mark.parametrize("tower", ["clip", "siglip"])
    def test_configuration(self, settings: Make, family: str, tower: str) -> None:
        built = build_vlm(settings(family, tower))
        config, rules = built.model.config, built.rules
        assert config.image_token_index == rules.image_token_id
        assert config.image_seq_length == rules.image_tokens == 16
        assert config.vision_feature_layer == -2
        assert config.vision_feature_select_strategy == {"clip": "default", "siglip": "full"}[tower]
        rows = built.model.lm_head.weight.shape[0]
        assert rules.image_token_id < rows == config.text_config.vocab_size
        tied = built.model.lm_head.weight is built.model.get_input_embeddings().weight
        assert tied == config.tie_word_embeddings == (family in TIED)
        assert built.processor.tokenizer is built.tokenizer
        assert built.processor.chat_template == rules.chat_template

    def test_original_weights_are_inside(self, parts: Path, settings: Make) -> None:
        model = build_vlm(settings("llama3", "siglip")).model
        assert digest_of_llm(model) == digest_of_llm(parts / "llama3")
        alone = load_tower(settings(tower="siglip"), dtype=torch.float32)
        assert digest_of_model(model.model.vision_tower.state_dict()) == digest_of_model(alone.state_dict())

    def test_parts_are_not_copied(self, settings: Make) -> None:
        chosen = settings("gemma2")
        llm, tower = load_llm(chosen, dtype=torch.float32), load_tower(chosen, dtype=torch.float32)
        tokenizer = load_tokenizer(chosen)
        rules = text_rules(family_of(llm.config, tokenizer), tokenizer, image_tokens_of(tower.config))
        model = vlm_module._join(llm, tower, chosen, rules, weights=True)
        assert model.model.language_model is llm.model
        assert model.lm_head is llm.lm_head
        assert model.model.vision_tower is tower
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])

    def test_attention_of_each_part(self, settings: Make) -> None:
        config = build_vlm(settings("gemma2")).model.config
        assert config.text_config._attn_implementation == "eager"
        assert config.vision_config._attn_implementation == "sdpa"
        assert build_vlm(settings("qwen2")).model.config.text_config._attn_implementation == "sdpa"

    def test_connector_comes_from_the_seed_alone(self, settings: Make) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = build_vlm(settings(), seed=5).model.model.multi_modal_projector.state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        second = build_vlm(settings(), seed=5).model.model.multi_modal_projector.state_dict()
        other = build_vlm(settings(), seed=6).model.model.multi_modal_projector.state_dict()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name])
            assert not torch.equal(tensor, other[name])
            bound = first[name.replace("bias", "weight")].shape[1] ** -0.5
            assert 0.7 * bound < tensor.abs().max() <= bound

    def test_dtypes(self, settings: Make) -> None:
        model = build_vlm(settings(), dtype=torch.bfloat16).model
        kinds = {
            name.split(".")[1] if name.startswith("model.") else name: p.dtype for name, p in model.named_parameters()
        }
        assert kinds == {
            "vision_tower": torch.bfloat16,
            "multi_modal_projector": torch.float32,
            "language_model": torch.bfloat16,
            "lm_head.weight": torch.bfloat16,
        }

    def test_connector_from_a_file(self, settings: Make, tmp_path: Path) -> None:
        model = build_vlm(settings(), seed=3).model
        write_mm_projector(model.model.multi_modal_projector, tmp_path / "mm_projector.bin")
        again = build_vlm(settings(), connector=tmp_path / "mm_projector.bin", seed=4).model
        start = build_vlm(settings(connector_from=str(tmp_path)), seed=4).model
        expected = digest_of_model(model.model.multi_modal_projector.state_dict())
        assert digest_of_model(again.model.multi_modal_projector.state_dict()) == expected
        assert digest_of_model(start.model.multi_modal_projector.state_dict()) == expected

    def test_connector_of_another_llm(self, settings: Make, tmp_path: Path) -> None:
        write_mm_projector(build_vlm(settings()).model.model.multi_modal_projector, tmp_path / "mm_projector.bin")
        wide = write_tiny_llm(tmp_path / "wide", "qwen2", hidden_size=48)
        chosen = settings().model_copy(update={"llm": str(wide)})
        with pytest.raises(ModelError, match=r"wrong LLM for a connector.*\[32, 16\].*\[48, 16\]"):
            build_vlm(chosen, connector=tmp_path / "mm_projector.bin")

    def test_adapter_is_merged(self, parts: Path, settings: Make, tmp_path: Path) -> None:
        proxy = _adapter(settings("lab"), tmp_path / "proxy")
        batch = tiny_batch(["text:2 label:6"])
        with torch.no_grad():
            expected = hidden_states(proxy, batch)
            merged = build_vlm(settings("lab"), adapter=tmp_path / "proxy").model
            torch.testing.assert_close(hidden_states(merged, batch), expected, rtol=0, atol=1e-5)
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert digest_of_llm(merged) != digest_of_llm(parts / "lab")

    def test_adapter_of_another_llm(self, parts: Path, settings: Make, tmp_path: Path) -> None:
        _adapter(settings("lab"), tmp_path / "proxy")
        write_tiny_llm(tmp_path / "lab2", "lab", seed=9)
        chosen = settings().model_copy(update={"llm": str(tmp_path / "lab2")})
        digests = [digest_of_part(str(folder))[:12] for folder in (parts / "lab", tmp_path / "lab2")]
        with pytest.raises(ModelError, match=f"another LLM.*{digests[0]}.*{digests[1]}"):
            build_vlm(chosen, adapter=tmp_path / "proxy")


def _adapter(settings: ModelSettings, folder: Path) -> torch.nn.Module:
    proxy = attach_lora(load_llm(settings, dtype=torch.float32), LoraSettings(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in proxy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(proxy, folder, base=settings.llm, base_digest=digest_of_part(settings.llm))
    return proxy
