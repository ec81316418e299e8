"""Questions to answers: greedy, batched, continued after a kill. Any image-text-to-text model of transformers.

Legend: B questions of a batch, L padded length, N new tokens, X columns of what ``generate`` returns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, ProcessorMixin

from dpa.errors import DpaError
from dpa.evaluate.asking import Asked, Question, asked, asked_digests, batches, check_ids, digest, encode, open_images
from dpa.evaluate.devices import Answerer, identity_of, spread
from dpa.evaluate.images import MAX_IMAGE_PIXELS, LazyImage
from dpa.evaluate.predictions import Prediction, PredictionFile

__all__ = ["MAX_IMAGE_PIXELS", "LazyImage", "Prediction", "Progress", "Question", "generate_answers"]

Progress = Callable[[int, int], None]
"""Called with (questions answered, all questions)."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A batch to answer."""

    batch: tuple[Asked, ...]
    max_new_tokens: int


def generate_answers(
    model: Answerer,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
    with_image: bool = True,
    out: Path | None = None,
    progress: Progress | None = None,
    identity: str | None = None,
) -> list[Prediction]:
    """Asks every question as a chat of one user turn and decodes greedily.

    Questions of similar length share a batch, padded on the left; in float32 the answers are those of one-by-one
    generation. The model's own sampling settings (temperature, repetition penalty) are left aside; its end-of-turn ids
    are used. Afterwards training flags, generation settings and random generators are as they were.

    Args:
        model: in one floating-point dtype, on the device where it shall run; or copies of it on several devices.
        processor: its processor, with a chat template for typed parts.
        questions: see :class:`Question`.
        batch_size: B.
        max_new_tokens: N at most.
        with_image: False asks the text alone, without an image part.
        out: JSONL that answers are appended to, batch by batch; the same call after a kill asks what is missing.
        progress: called at the start and after each batch.
        identity: digest of the weights where the caller knows it; None: computed where ``out`` needs it.

    Returns:
        One prediction per question, in their order.

    Raises:
        DataError: two questions share an id, or an image cannot be read; names id and file.
        ModelError: the processor has no chat template.
        DpaError: rendering, encoding or generation failed; names the ids. Never an empty answer in its stead.
        StorageError: ``out`` cannot be written.
    """
    check_ids(questions)
    items = [asked(processor, question, with_image=with_image) for question in questions]
    done: dict[str, Prediction] = {}
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        file = None
        if out is not None:
            weights = identity_of(model) if identity is None else identity
            run = run_digest(weights, processor, max_new_tokens)
            file = stack.enter_context(PredictionFile(out, run, Prediction))
            digests = asked_digests(items)
            done = file.restore(digests)
        if progress is not None:
            progress(len(done), len(items))
        left = [item for item in items if item.question.id not in done]
        jobs = (_Job(tuple(batch), max_new_tokens) for batch in batches(left, batch_size))
        for answers in spread(model, processor, _answer, jobs):
            if file is not None:
                file.append(answers, digests)
            done |= {answer.id: answer for answer in answers}
            if progress is not None:
                progress(len(done), len(items))
    return [done[question.id] for question in questions]


def run_digest(weights: str, processor: Any, setting: Any) -> str:
    """Of what decides an answer besides the question: weights, pixels, settings (JSON-able)."""
    return digest([weights, json.loads(processor.image_processor.to_json_string()), setting])


def _answer(model: Any, processor: ProcessorMixin, job: _Job) -> list[Prediction]:
    images = [open_images(item) for item in job.batch]
    inputs = encode(processor, job.batch, images, side="left").to(model.device, dtype=model.dtype)
    with answering(model, processor, job.max_new_tokens), out_of_batch(job.batch):
        output_BX: Tensor = model.generate(**inputs)
        new_BN = _new_tokens(model, inputs["input_ids"], output_BX).tolist()
        ends = end_ids(model, processor)
    return [_prediction(item.question.id, new, ends, processor) for item, new in zip(job.batch, new_BN, strict=True)]


@contextmanager
def out_of_batch(batch: Sequence[Asked]) -> Iterator[None]:
    """Errors inside name the batch, and say what to do where memory was too small."""
    try:
        yield
    except Exception as error:
        names = ", ".join(item.question.named() for item in batch[:3])
        more = f" and {len(batch) - 3} more" if len(batch) > 3 else ""
        hint = ""
        # on the CPU it is an error of no kind of its own
        if (
            isinstance(error, torch.OutOfMemoryError)
            or "out of memory" in str(error)
            or "allocate memory" in str(error)
        ):
            half = f"batch_size {len(batch) // 2}" if len(batch) > 1 else "a device with more memory, or smaller images"
            hint = f". Out of memory with {len(batch)} in a batch: try {half}; what is answered is kept"
        raise DpaError(f"generation failed in the batch of {names}{more}: {error}{hint}") from error


def _new_tokens(model: Any, ids_BL: Tensor, output_BX: Tensor) -> Tensor:
    """Decoders return prompt and answer, encoder-decoders (Florence-2) a start token and the answer, and models that
    are fed embeddings alone (BLIP-2's older kin) the answer."""
    if model.config.is_encoder_decoder:
        return output_BX[:, 1:]
    length = ids_BL.shape[1]
    repeats = output_BX.shape[1] >= length and torch.equal(output_BX[:, :length], ids_BL)
    return output_BX[:, length:] if repeats else output_BX


def _prediction(name: str, new_N: list[int], ends: set[int], processor: ProcessorMixin) -> Prediction:
    """Cuts at the first end of turn; what follows is padding of a batch whose other answers were longer."""
    end = next((place for place, token in enumerate(new_N) if token in ends), None)
    own = new_N if end is None else new_N[: end + 1]
    text: str = processor.tokenizer.decode(own, skip_special_tokens=True)
    return Prediction(id=name, prediction=text.strip(), tokens=len(own), finished=end is not None)


def end_ids(model: Any, processor: ProcessorMixin) -> set[int]:
    """Tokens that end a turn: the model's own, else its tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = processor.tokenizer.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@contextmanager
def answering(model: Any, processor: ProcessorMixin, max_new_tokens: int = 1) -> Iterator[None]:
    """Evaluation mode, no gradients, plain greedy decoding; everything is put back.

    transformers fills what a caller's GenerationConfig leaves open from the model's own (Qwen2.5: a repetition
    penalty), so the model's own is exchanged for the time being.
    """
    own = model.generation_config
    pad = processor.tokenizer.pad_token_id
    ends = sorted(end_ids(model, processor))
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        eos_token_id=ends or None,
        pad_token_id=own.pad_token_id if pad is None else pad,
    )
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    model.generation_config = greedy
    try:
        # not inference_mode: buffers that a module caches meanwhile could not take part in a later training step
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        for module, flag in training:
            module.training = flag
