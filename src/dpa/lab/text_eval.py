"""How well an LLM answers questions about text descriptions of scenes, and how it finds either language.

Legend: B samples, L padded length, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Any, Final

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.lab.language import Language, caption
from dpa.lab.questions import balanced_questions
from dpa.lab.scenes import MAX_OBJECTS, draw_scene

HELD_OUT_SEED: Final = 900_000
"""World of the held-out scenes: no training stream and no data set draws from it."""


@torch.inference_mode()
def question_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scenes: int = 600,
    per_scene: int = 4,
    language: Language = "a",
    synonyms: bool = False,
    maximum: int = MAX_OBJECTS,
    seed: int = HELD_OUT_SEED,
    batch: int = 64,
) -> dict[str, float]:
    """Share of exactly right greedy answers per kind, their ``mean`` over kinds, and the number of ``questions``.

    The prompt is one user turn, ``"{description}\\n{question}"``. An answer is right if each of its tokens and the end
    of the turn is the most likely next token: the same as comparing greedy generation, in one forward pass.
    """
    rng = random.Random(f"descriptions:{seed}:{language}:{synonyms}")
    drawn = [draw_scene(seed, index, maximum=maximum) for index in range(scenes)]
    asked = balanced_questions(drawn, per_scene, seed)
    rows: list[tuple[str, list[int], list[int]]] = []
    for scene, question in asked:
        description = caption(scene, language, rng, synonyms=synonyms).text
        messages = [{"role": "user", "content": f"{description}\n{question.text}"}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = [*tokenizer.encode(question.answer, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((question.kind, prompt_ids, answer_ids))
    rows.sort(key=lambda row: len(row[1]))
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        length = max(len(prompt) + len(answer) for _, prompt, answer in part)
        ids_BL = torch.full((len(part), length), tokenizer.pad_token_id)
        for index, (_, prompt_ids, answer_ids) in enumerate(part):
            ids_BL[index, : len(prompt_ids) + len(answer_ids)] = torch.tensor(prompt_ids + answer_ids)
        # Padding stands behind everything that is read, so causal attention never sees it.
        best_BL = model(input_ids=ids_BL, use_cache=False).logits.argmax(-1)
        for index, (kind, prompt_ids, answer_ids) in enumerate(part):
            first = len(prompt_ids) - 1
            right[kind].append(best_BL[index, first : first + len(answer_ids)].tolist() == answer_ids)
    accuracy = {kind: sum(values) / len(values) for kind, values in sorted(right.items())}
    return {"mean": sum(accuracy.values()) / len(accuracy), **accuracy, "questions": len(rows)}


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    language: Language,
    *,
    captions: int = 500,
    seed: int = HELD_OUT_SEED,
) -> dict[str, float]:
    """Perplexity of held-out captions (caption and newline, nothing before it), per token and per word.

    The first token has no context and is not predicted.
    """
    rng = random.Random(f"perplexity:{seed}:{language}")
    nll, tokens, words = 0.0, 0, 0
    for index in range(captions):
        text = caption(draw_scene(seed, index), language, rng).text
        ids_L = torch.tensor(tokenizer.encode(text + "\n", add_special_tokens=False))
        logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0].float()
        nll += float(functional.cross_entropy(logits_LV[:-1], ids_L[1:], reduction="sum"))
        tokens += len(ids_L) - 1
        words += len(text.split())
    return {
        "per_token": round(math.exp(nll / tokens), 3),
        "per_word": round(math.exp(nll / words), 3),
        "nats_per_token": round(nll / tokens, 4),
        "mean_tokens": round(tokens / captions + 1, 1),
    }


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The shipped LLM's figures: accuracies on descriptions in A, in A with B's words and in B; perplexities."""
    model.train(False)

    def rounded(values: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in values.items()}

    return {
        "accuracy": rounded(question_accuracy(model, tokenizer, scenes=1500, per_scene=3)),
        "accuracy_synonyms": rounded(question_accuracy(model, tokenizer, scenes=600, per_scene=2, synonyms=True)),
        "accuracy_language_b": rounded(question_accuracy(model, tokenizer, scenes=600, per_scene=2, language="b")),
        "perplexity_a": perplexity(model, tokenizer, "a"),
        "perplexity_b": perplexity(model, tokenizer, "b"),
    }
