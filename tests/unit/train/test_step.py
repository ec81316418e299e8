from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpa.errors import UserError
from dpa.models.contrast import contrast
from dpa.models.freeze import set_trainable
from dpa.models.text_pass import text_only_logprobs
from dpa.testing.models import tiny_batch, tiny_llava, tiny_text_config
from dpa.train.settings import StageSettings
from dpa.train.step import StepSettings, TrainStep, step_settings
from dpa.types import Batch
from tests.oracles import objectives as oracle
from tests.oracles.contrast import labels_for_reference, reference_logits
from tests.stages import IMAGES, TEXTS

BOUNDS = {"minimum": 1e-4, "maximum": 0.05}
"""A random model is never sure: inside these, weights lie between the bounds."""


def stage(**more: Any) -> StageSettings:
    return StageSettings.model_validate({"learning_rate": 1e-3, **more})


def settings(objective: str = "cmo", fidelity: str = "exact", **more: Any) -> StepSettings:
    return step_settings(stage(**more), objective_name=objective, fidelity=fidelity)  # type: ignore[arg-type]


def filler(batch: Batch) -> Batch:
    return replace(batch, supervised=torch.zeros_like(batch.supervised))


class TestSettings:
    def test_bounds_are_the_objectives_unless_named(self) -> None:
        assert (settings("cmo").minimum, settings("cmo").maximum) == (0.05, 0.5)
        assert (settings("cal").minimum, settings("cal").maximum) == (1.0, 5.0)
        assert (settings("cmo", minimum=0.1).minimum, settings("cmo", minimum=0.1).maximum) == (0.1, 0.5)

    def test_uniform_has_no_bounds(self) -> None:
        assert (settings("uniform", **BOUNDS).minimum, settings("uniform", **BOUNDS).maximum) == (1.0, 1.0)

    def test_bounds_in_the_wrong_order(self) -> None:
        with pytest.raises(UserError, match=r"minimum 0.7 is above maximum 0.5; .* 0.05 and 0.5"):
            settings("cmo", minimum=0.7)

    def test_window_is_the_objectives_unless_named(self) -> None:
        assert (settings("cmo").window, settings("prior").window, settings("prior", window=5).window) == (3, 1, 5)

    def test_even_window(self) -> None:
        with pytest.raises(UserError, match="window is 4; give an odd number"):
            settings("cmo", window=4)

    def test_spans_is_not_official(self) -> None:
        with pytest.raises(UserError, match="spans is not in the reference implementation"):
            settings("spans", "official")

    def test_prior_is_not_official(self) -> None:
        with pytest.raises(UserError, match="prior is not in the reference implementation"):
            settings("prior", "official")

    def test_packing_is_on_where_it_changes_nothing_but_roundings(self) -> None:
        assert settings("cmo").packing is True
        assert settings("cmo", packing=False).packing is False
        assert settings("cmo", tokens_per_micro_batch=4096).packing is True
        assert settings("cmo", "official").packing is settings("cmo", "official", packing=False).packing is False

    @pytest.mark.parametrize("given", [{"packing": True}, {"tokens_per_micro_batch": 4096}])
    def test_official_reads_the_padded_batch(self, given: dict[str, int]) -> None:
        (name,) = given
        with pytest.raises(UserError, match=f"{name} .* with fidelity official"):
            settings("cmo", "official", **given)

    def test_a_budget_needs_packing(self) -> None:
        with pytest.raises(UserError, match=r"tokens_per_micro_batch 4096 with packing false.*now 16"):
            settings("cmo", packing=False, tokens_per_micro_batch=4096)

    @pytest.mark.parametrize(
        ("objective", "fidelity", "policy", "needs"),
        [
            ("cmo", "exact", "mean", True),
            ("cal", "exact", "mean", True),
            ("cmo", "exact", "zero", False),
            ("cmo", "official", "mean", False),
            ("uniform", "exact", "mean", False),
        ],
    )
    def test_who_waits_for_the_mean(self, objective: str, fidelity: str, policy: str, needs: bool) -> None:
        assert settings(objective, fidelity, text_only=policy).needs_mean_weight is needs


class TestExact:
    def test_uniform_is_the_sum_over_labels_and_makes_one_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        expected = -contrast(model, batch, without=False).logp_with.sum()

        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError("a text-only pass")

        monkeypatch.setattr("dpa.models.contrast.text_only_logprobs", refused)
        output = TrainStep(model, settings("uniform"))(batch, None)
        torch.testing.assert_close(output.loss_sum, expected)
        assert output.weight_sum == batch.supervised.sum()

    @pytest.mark.parametrize("objective", ["cmo", "cal"])
    def test_weights_of_image_tokens(self, objective: str) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        bounds = BOUNDS if objective == "cmo" else {}
        step = TrainStep(model, settings(objective, **bounds))
        read = contrast(model, batch, logits=True)
        with_image, without = (read.logp_with.exp(), read.logp_without.exp())  # type: ignore[union-attr]
        if objective == "cal":
            with_image, without = read.logit_with, read.logit_without  # type: ignore[assignment]
        difference = (with_image - without).tolist()
        segments = read.segment_ids.tolist()
        used = step.settings
        weights = torch.tensor(
            oracle.token_weights(difference, segments, used.minimum, used.maximum, used.window), dtype=torch.float64
        )
        assert weights.std() > 0.1 * weights.mean(), "the case must have something to weigh"
        output = step(batch, None)
        expected = -(weights * read.logp_with.double()).sum()
        torch.testing.assert_close(output.loss_sum.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(output.weight_sum.double(), weights.sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(output.stats["image_weight"].double(), weights.sum(), rtol=1e-5, atol=0)
        assert output.stats["image_tokens"] == len(weights)

    @pytest.mark.parametrize(("policy", "weight"), [("mean", 0.37), ("minimum", 0.05), ("zero", 0.0)])
    def test_weight_of_text_only_tokens(self, policy: str, weight: float) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(TEXTS)
        step = TrainStep(model, settings("cmo", text_only=policy))
        output = step(batch, weight if policy == "mean" else None)
        nll = -contrast(model, batch, without=False).logp_with.sum()
        torch.testing.assert_close(output.loss_sum, weight * nll)
        torch.testing.assert_close(output.weight_sum, weight * batch.supervised.sum())
        assert output.stats["text_only"] == output.stats["tokens"] == batch.supervised.sum()
        assert output.stats["image_weight"] == output.stats["image_tokens"] == 0

    def test_spans_by_hand(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        count = int(batch.supervised.sum())
        marked = torch.arange(count).remainder(3).eq(0).float()
        step = TrainStep(model, settings("spans", minimum=0.1, window=1))
        output = step(replace(batch, marked=marked), None)
        weights = torch.where(marked == 1, 1.0, 0.1)
        expected = -(weights * contrast(model, batch, without=False).logp_with).sum()
        torch.testing.assert_close(output.loss_sum, expected)
        torch.testing.assert_close(output.weight_sum, weights.sum())

    @pytest.mark.parametrize(("policy", "weight"), [("mean", 0.37), ("minimum", 0.05)])
    def test_spans_of_text_that_nobody_marked(self, policy: str, weight: float) -> None:
        """A micro-batch of text alone has no marks, and one that fills up a rank no label."""
        model, texts = tiny_llava("qwen2"), tiny_batch(TEXTS)
        step = TrainStep(model, settings("spans", text_only=policy))
        output = step(texts, weight if policy == "mean" else None)
        torch.testing.assert_close(output.weight_sum, weight * texts.supervised.sum())
        for batch in (filler(texts), filler(tiny_batch(IMAGES))):
            empty = step(batch, 0.5)
            assert empty.loss_sum == empty.weight_sum == 0
        with pytest.raises(UserError, match="needs marked, which is missing"):
            step(tiny_batch(IMAGES), None)

    def test_mean_must_be_known(self) -> None:
        with pytest.raises(AssertionError, match="before the mean weight"):
            TrainStep(tiny_llava("qwen2"), settings("cmo"))(tiny_batch(TEXTS), None)

    def test_prior(self) -> None:
        reference = AutoModelForCausalLM.from_config(tiny_text_config("qwen2")).requires_grad_(False)
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        step = TrainStep(model, settings("prior"), reference=reference)
        weights = 1 - text_only_logprobs(reference, batch).logp.exp()
        output = step(batch, None)
        torch.testing.assert_close(output.weight_sum, weights.sum())
        torch.testing.assert_close(output.loss_sum, -(weights * contrast(model, batch, without=False).logp_with).sum())

    def test_a_frozen_llm_is_its_own_reference(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        set_trainable(model, "pretrain")
        read = contrast(model, batch)
        assert read.logp_without is not None
        weights = 1 - read.logp_without.exp()
        step = TrainStep(model, settings("prior"))
        for given in (batch, replace(batch, logp_without=read.logp_without)):  # from the cache, too
            output = step(given, None)
            torch.testing.assert_close(output.weight_sum, weights.sum())
            torch.testing.assert_close(output.loss_sum, -(weights * read.logp_with).sum())

    def test_prior_without_reference(self) -> None:
        with pytest.raises(UserError, match="objective prior needs a frozen text-only LLM"):
            TrainStep(tiny_llava("qwen2"), settings("prior"))

    def test_stage_one_needs_no_tower(self) -> None:
        llm, batch = AutoModelForCausalLM.from_config(tiny_text_config("llama")), tiny_batch(TEXTS)
        logp = llm(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)[:, :-1]
        nll = -logp.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)[batch.supervised[:, 1:]].sum()
        torch.testing.assert_close(TrainStep(llm, settings("uniform"))(batch, None).loss_sum, nll)


class TestOfficial:
    @pytest.mark.parametrize("objective", ["cmo", "cal"])
    @pytest.mark.parametrize("family", ["qwen2", "gemma2"])
    def test_micro_batch_against_the_transcription(self, family: Any, objective: str) -> None:
        """Every logit of every position at hand, weights and division as the reference writes them."""
        model, batch = tiny_llava(family, seed=3).double(), tiny_batch(IMAGES, seed=3)
        bounds = BOUNDS if objective == "cmo" else {}
        used = settings(objective, "official", **bounds)
        output = TrainStep(model, used)(batch, None)
        with_image, without = reference_logits(model, batch)
        expected, _ = oracle.official_loss(
            with_image,
            without,
            labels_for_reference(batch),
            kind=objective,
            minimum=used.minimum,
            maximum=used.maximum,
        )
        assert output.weight_sum == 1, "a micro-batch counts once, whatever its size"
        torch.testing.assert_close(output.loss_sum.double(), expected, rtol=1e-6, atol=0)

    def test_text_only_tokens_weigh_the_same(self) -> None:
        """delta_min for all of a micro-batch without images cancels: the plain mean, but for the reference's 1e-6."""
        model, batch = tiny_llava("qwen2"), tiny_batch(TEXTS)
        output = TrainStep(model, settings("cmo", "official"))(batch, None)
        mean = -contrast(model, batch, without=False).logp_with.mean()
        torch.testing.assert_close(output.loss_sum, mean, rtol=1e-5, atol=0)

    def test_filler_does_not_count(self) -> None:
        output = TrainStep(tiny_llava("qwen2"), settings("cmo", "official"))(filler(tiny_batch(IMAGES)), None)
        assert output.weight_sum == 0
        assert output.loss_sum == 0


class TestGraph:
    @pytest.mark.parametrize("stage_name", ["pretrain", "finetune"])
    @pytest.mark.parametrize("fidelity", ["exact", "official"])
    @pytest.mark.parametrize("kind", ["text", "image filler", "text filler"])
    def test_every_trained_parameter_gets_a_gradient(self, stage_name: Any, fidelity: str, kind: str) -> None:
        """DDP waits for each of them."""
        model = tiny_llava("qwen2")
        set_trainable(model, stage_name)
        batch = tiny_batch(IMAGES if kind == "image filler" else TEXTS)
        batch = filler(batch) if "filler" in kind else batch
        step = TrainStep(model, settings("cmo", fidelity))
        step(batch, 0.3).loss_sum.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert gradients
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        connector = [gradient for name, gradient in gradients.items() if "multi_modal_projector" in name]
        assert all(bool((gradient == 0).all()) for gradient in connector if gradient is not None)
        if "filler" in kind:
            assert all(bool((gradient == 0).all()) for gradient in gradients.values() if gradient is not None)

    def test_weights_are_constants(self) -> None:
        """The gradient is that of sum(w * CE) with w as numbers."""
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        set_trainable(model, "pretrain")
        step = TrainStep(model, settings("cmo", **BOUNDS))
        step(batch, None).loss_sum.backward()
        weight = model.model.multi_modal_projector.linear_2.weight
        found, weight.grad = weight.grad, None
        read = contrast(model, batch)
        weights = step._weights(read, batch, None)
        (-(weights.clone() * read.logp_with).sum()).backward()
        torch.testing.assert_close(found, weight.grad)


class TestPrecision:
    def test_bf16_autocast(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        set_trainable(model, "finetune")
        exact = TrainStep(model, settings("uniform"))(batch, None)
        step = TrainStep(model, settings("uniform"), autocast=torch.bfloat16)
        output = step(batch, None)
        output.loss_sum.backward()
        assert output.loss_sum.dtype == output.weight_sum.dtype == torch.float32
        assert {value.grad.dtype for value in model.parameters() if value.grad is not None} == {torch.float32}
        assert output.loss_sum != exact.loss_sum, "bf16 products were asked for"
        # three layers of bf16 products, 8 bits each
        torch.testing.assert_close(output.loss_sum, exact.loss_sum, rtol=2e-2, atol=0)

    def test_a_launchers_autocast_does_not_reach_a_float32_run(self) -> None:
        model, batch = tiny_llava("qwen2"), tiny_batch(IMAGES)
        step = TrainStep(model, settings("uniform"))
        exact = step(batch, None).loss_sum
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(step(batch, None).loss_sum, exact)
