"""Batched, left-padded, continued generation against one-by-one generation as a user of transformers writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from dpa.errors import DataError, DpaError
from dpa.evaluate.generate import Prediction, Question, generate_answers
from dpa.models.vlm import Vlm
from dpa.testing.parts import TinyFamily
from tests.unit.evaluate.conftest import WORDS, tiny_vlm, write_pictures

NEW = 6


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Seven questions of different lengths; the fourth has no picture."""
    pictures = write_pictures(tmp_path / "images", 7)
    return [
        Question(
            id=f"q{number}",
            text=" ".join((WORDS * 2)[number : number + 1 + (number * 5) % 7]) + "?",
            images=() if number == 3 else (pictures[number],),
            where=f"questions.jsonl, line {number + 1}",
        )
        for number in range(7)
    ]


def ask(vlm: Vlm, questions: list[Question], **settings: Any) -> list[Prediction]:
    return generate_answers(vlm.model, vlm.processor, questions, **{"batch_size": 3, "max_new_tokens": NEW, **settings})


def oracle(vlm: Vlm, question: Question, with_image: bool = True) -> str:
    """One question, alone, as a user of transformers would ask it."""
    images = [{"type": "image", "image": Image.open(path)} for path in question.images] if with_image else []
    inputs = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    output = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    return vlm.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma2"])
@pytest.mark.parametrize("with_image", [True, False])
def test_batched_answers_are_the_one_by_one_answers(
    family: TinyFamily, with_image: bool, questions: list[Question], tmp_path: Path
) -> None:
    vlm = tiny_vlm(tmp_path, family)
    expected = [oracle(vlm, question, with_image) for question in questions]
    answers = ask(vlm, questions, with_image=with_image)
    assert [answer.id for answer in answers] == [question.id for question in questions]
    assert [answer.prediction for answer in answers] == expected
    assert len(set(expected)) > 3, "answers that are all the same would hide a mix-up"


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_several_images_one_and_none(family: TinyFamily, questions: list[Question], tmp_path: Path) -> None:
    vlm = tiny_vlm(tmp_path, family)
    pictures = [item.images[0] for item in questions if item.images]
    asked = [
        Question(id=f"{count}-{number}", text=questions[number].text, images=tuple(pictures[number : number + count]))
        for number, count in enumerate((2, 0, 1, 3, 2))
    ]
    expected = [oracle(vlm, question) for question in asked]
    assert [answer.prediction for answer in ask(vlm, asked)] == expected
    swapped = Question(id="swapped", text=asked[0].text, images=asked[0].images[::-1])
    assert len({*expected, oracle(vlm, swapped)}) > 3, "answers that are all the same would hide a mix-up"


def test_a_bos_that_template_and_tokenizer_both_write_is_there_once(questions: list[Question], tmp_path: Path) -> None:
    vlm = tiny_vlm(tmp_path, "llama3")  # our own checkpoints do not have it so; other people's do
    bos = (vlm.tokenizer.bos_token, vlm.tokenizer.bos_token_id)
    vlm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert vlm.tokenizer("red")["input_ids"][0] == bos[1]
    assert [answer.prediction for answer in ask(vlm, questions)] == [oracle(vlm, item) for item in questions]


def test_the_picture_matters(vlm: Vlm, questions: list[Question]) -> None:
    seen, blind = ask(vlm, questions), ask(vlm, questions, with_image=False)
    assert seen[3].prediction == blind[3].prediction
    assert sum(one.prediction != other.prediction for one, other in zip(seen, blind, strict=True)) > 2


def test_dropout_is_off_and_no_graph_is_built(
    vlm: Vlm, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(**inputs: Any) -> torch.Tensor:
        calls.append([module.training for module in vlm.model.modules()] + [torch.is_grad_enabled()])
        return type(vlm.model).generate(vlm.model, **inputs)

    monkeypatch.setattr(vlm.model, "generate", spy)
    vlm.model.train()
    try:
        ask(vlm, questions)
    finally:
        vlm.model.eval()
    assert len(calls) == 3
    assert not any(flag for call in calls for flag in call)


def test_an_answer_ends_at_the_end_of_turn(vlm: Vlm, questions: list[Question]) -> None:
    whole = ask(vlm, questions)
    assert all(answer.tokens == NEW and not answer.finished for answer in whole)
    own = vlm.model.generation_config
    first = vlm.tokenizer(whole[0].prediction, add_special_tokens=False)["input_ids"][0]
    vlm.model.generation_config = GenerationConfig(eos_token_id=[first], pad_token_id=own.pad_token_id)
    try:
        cut = ask(vlm, questions)
    finally:
        vlm.model.generation_config = own
    assert cut[0].finished
    assert cut[0].tokens < NEW
    assert any(not answer.finished for answer in cut), "other answers of the batch go on"
    assert [answer.prediction for answer in cut if not answer.finished] == [
        answer.prediction for answer, other in zip(whole, cut, strict=True) if not other.finished
    ]


def test_sampling_settings_of_the_model_are_left_aside(vlm: Vlm, questions: list[Question]) -> None:
    plain = ask(vlm, questions)
    own = vlm.model.generation_config
    vlm.model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=50.0, min_new_tokens=2, eos_token_id=own.eos_token_id
    )
    try:
        assert ask(vlm, questions) == plain
    finally:
        vlm.model.generation_config = own


def test_nothing_of_the_model_or_the_process_changes(vlm: Vlm, questions: list[Question]) -> None:
    model = vlm.model
    model.model.language_model.train()
    model.model.language_model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    config, torch_state = model.generation_config, torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        ask(vlm, questions)
        assert [module.training for module in model.modules()] == flags
        assert model.generation_config is config
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        with pytest.raises(DpaError):
            ask(vlm, [*questions, Question(id="bad", text="x", images=(Path("missing.png"),))])
        assert [module.training for module in model.modules()] == flags
        assert model.generation_config is config
        assert torch.is_grad_enabled()
    finally:
        model.eval()


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets to clean up in a way that matters, lines are on disk or not."""


def kill_after(batches: int) -> Any:
    calls = iter(range(100))

    def progress(done: int, total: int) -> None:
        if next(calls) == batches:
            raise Killed

    return progress


def test_continues_after_a_kill(vlm: Vlm, questions: list[Question], tmp_path: Path) -> None:
    whole = ask(vlm, questions)
    out = tmp_path / "deep" / "answers.jsonl"
    with pytest.raises(Killed):
        ask(vlm, questions, out=out, batch_size=2, progress=kill_after(1))
    assert len(out.read_text().splitlines()) == 2
    with open(out, "a", encoding="utf-8") as file:
        file.write('{"id": "q1", "prediction": "half a li')
    counts: list[tuple[int, int]] = []
    assert ask(vlm, questions, out=out, progress=lambda *count: counts.append(count)) == whole
    assert counts[0] == (2, 7), "two answers were there, the half one was not"
    assert counts[-1] == (7, 7)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["id"] for line in lines) == [f"q{number}" for number in range(7)]


def test_a_finished_file_is_read_not_asked_again(vlm: Vlm, questions: list[Question], tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    whole = ask(vlm, questions, out=out)
    before = out.read_bytes()
    few: list[tuple[int, int]] = []
    assert ask(vlm, questions[:2], out=out, progress=lambda *count: few.append(count)) == whole[:2]
    assert few == [(2, 2)]
    assert out.read_bytes() == before, "answers to questions that are not asked now are kept"


@pytest.mark.parametrize("change", ["weights", "question", "picture", "limit", "blind", "garbage"])
def test_stale_answers_are_asked_again(
    change: str, vlm: Vlm, questions: list[Question], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "answers.jsonl"
    ask(vlm, questions, out=out)
    settings: dict[str, Any] = {"out": out}
    stale = 7
    match change:
        case "weights":
            settings["identity"] = "another model"
        case "question":
            questions[2] = Question(id="q2", text="another?", images=questions[2].images)
            stale = 1
        case "picture":
            write_pictures(tmp_path / "other", 1)[0].rename(questions[5].images[0])
            stale = 1
        case "limit":
            settings["max_new_tokens"] = NEW - 1
        case "blind":
            settings["with_image"] = False
            stale = 6  # one question has no picture: the very same prompt
        case "garbage":
            lines = out.read_text(encoding="utf-8").splitlines()
            out.write_text("\n".join([lines[0], "\0\0\0", *lines[2:]]) + "\n", encoding="utf-8")
            stale = 1
    counts: list[tuple[int, int]] = []
    answers = ask(vlm, questions, **settings, progress=lambda *count: counts.append(count))
    assert counts[0] == (7 - stale, 7)
    settings.pop("out")
    assert answers == ask(vlm, questions, **settings)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 7


def test_the_weights_themselves_are_compared(questions: list[Question], tmp_path: Path) -> None:
    vlm, out = tiny_vlm(tmp_path, "lab"), tmp_path / "answers.jsonl"
    ask(vlm, questions, out=out)
    with torch.no_grad():
        vlm.model.model.multi_modal_projector.linear_1.bias[0] += 1e-3
    counts: list[tuple[int, int]] = []
    ask(vlm, questions, out=out, progress=lambda *count: counts.append(count))
    assert counts[0] == (0, 7)


@pytest.mark.parametrize("out", [True, False])
def test_an_unreadable_picture_names_the_question(
    out: bool, vlm: Vlm, questions: list[Question], tmp_path: Path
) -> None:
    questions[4].images[0].write_bytes(questions[4].images[0].read_bytes()[:40])
    with pytest.raises(DataError, match=r"question 'q4' \(questions.jsonl, line 5\).*4\.png"):
        ask(vlm, questions, out=tmp_path / "answers.jsonl" if out else None)


def test_a_question_that_cannot_be_encoded_is_named(vlm: Vlm, questions: list[Question]) -> None:
    questions[5] = Question(id="q5", text="what is <image> here?", images=questions[5].images)
    with pytest.raises(DpaError, match=r"question 'q5'.*encoding failed"):
        ask(vlm, questions)


def test_a_failing_model_is_an_error_that_names_the_batch(
    vlm: Vlm, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("kernel exploded")

    monkeypatch.setattr(vlm.model, "generate", fail)
    out = tmp_path / "answers.jsonl"
    with pytest.raises(DpaError, match=r"question 'q\d'.*kernel exploded"):
        ask(vlm, questions, out=out)
    assert not out.exists() or not out.read_bytes(), "no empty answers in its stead"


def test_two_questions_of_one_id_are_refused(vlm: Vlm, questions: list[Question]) -> None:
    with pytest.raises(DataError, match=r"'q0'.*line 1.*line 1"):
        ask(vlm, [*questions, questions[0]])
