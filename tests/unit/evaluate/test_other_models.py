"""Checkpoints of other architectures, loaded as ``dpa eval`` loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin

from dpa.errors import DpaError, ModelError
from dpa.evaluate.generate import Question, generate_answers
from dpa.evaluate.load import load_model, open_processor
from dpa.evaluate.rank import Choices, rank_options
from dpa.testing.llava_hf import write_tiny_llava_hf
from dpa.testing.other_models import write_other_model

SIZES = ((20, 20), (40, 16), (16, 50), (33, 33), (60, 20))
NEW = 5


@pytest.fixture(scope="module", params=["llava_hf", "llava_next", "idefics3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ProcessorMixin]:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    if request.param == "llava_hf":
        write_tiny_llava_hf(folder)
    else:
        write_other_model(folder, request.param)
    return load_model(str(folder), "cpu").float(), open_processor(str(folder))


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Images of many sizes, so of many numbers of tiles; one question without, two with two."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    words = ["red", "blue", "circle", "what", "object", "two"]
    one = [Question(f"q{n}", " ".join(words[: n + 1]), (path,)) for n, path in enumerate(paths)]
    two = [Question("m", "which circle", tuple(paths[:2])), Question("n", "what object is it", tuple(paths[2:4]))]
    return [*one, Question("t", "red blue"), *two]


def alone(model: Any, processor: Any, question: Question) -> str:
    """As a user of transformers asks."""
    images: Any = [{"type": "image", "image": Image.open(path)} for path in question.images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    return str(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_batches_of_many_image_sizes(loaded: tuple[Any, ProcessorMixin], questions: list[Question]) -> None:
    model, processor = loaded
    side = processor.tokenizer.padding_side
    answers = generate_answers(model, processor, questions, batch_size=4, max_new_tokens=NEW)
    expected = [alone(model, processor, question) for question in questions]
    assert [answer.prediction for answer in answers] == expected
    assert len(set(expected)) > 4, "answers that are all the same would hide a mix-up"
    assert processor.tokenizer.padding_side == side


def test_options_in_batches(loaded: tuple[Any, ProcessorMixin], questions: list[Question]) -> None:
    model, processor = loaded
    choices = [Choices(question, ("red", "blue circle", "two")) for question in questions]
    single = rank_options(model, processor, choices, batch_size=1)
    batched = rank_options(model, processor, choices, batch_size=5)
    for one, many in zip(single, batched, strict=True):
        assert (one.id, one.best) == (many.id, many.best)
        assert many.logp == pytest.approx(one.logp, rel=1e-5)  # float32 sums of another shape
    assert len({round(one.logp[0], 3) for one in single}) > 4, "rows that are all the same would hide a mix-up"


def test_a_checkpoint_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    folder = str(write_other_model(tmp_path / "bare", "llava_next", template=False))
    model, processor = load_model(folder, "cpu"), open_processor(folder)
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        generate_answers(model, processor, [Question("a", "red?")], batch_size=1, max_new_tokens=2)


def test_a_tokenizer_that_pads_elsewhere_is_found_out(
    loaded: tuple[Any, ProcessorMixin], questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    call = type(processor.tokenizer)._encode_plus

    def right(self: Any, *arguments: Any, **settings: Any) -> Any:
        return call(self, *arguments, **{**settings, "padding_side": "right"})

    monkeypatch.setattr(type(processor.tokenizer), "_encode_plus", right)
    with pytest.raises(DpaError, match="does not pad on the left"):
        generate_answers(model, processor, questions, batch_size=4, max_new_tokens=2)


def test_a_tokenizer_without_padding_token(
    loaded: tuple[Any, ProcessorMixin], questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    expected = generate_answers(model, processor, questions, batch_size=4, max_new_tokens=NEW)
    pad = processor.tokenizer.pad_token
    processor.tokenizer.pad_token = None
    try:
        assert generate_answers(model, processor, questions, batch_size=4, max_new_tokens=NEW) == expected
        assert processor.tokenizer.pad_token is None
    finally:
        processor.tokenizer.pad_token = pad


def test_out_of_memory_says_which_batch_size(
    loaded: tuple[Any, ProcessorMixin], questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded

    def fail(**_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(DpaError, match=r"question 'q\d'.*Out of memory with 4 in a batch: try batch_size 2"):
        generate_answers(model, processor, questions[:4], batch_size=4, max_new_tokens=2)
