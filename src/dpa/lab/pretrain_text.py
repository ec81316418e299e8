"""What the lab's LLM is made from: its tokenizer, its chat format and its endless stream of training sequences.

Legend: B sequences of a batch, L tokens of a sequence (fixed).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpa.lab.language import LANGUAGES, SYNONYMS, Language, caption
from dpa.lab.questions import KINDS, ask
from dpa.lab.scenes import COLUMNS, MAX_OBJECTS, ROWS, Scene, draw_scene

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
IMAGE: Final = "<image>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, TURN_START, TURN_END, IMAGE)

CHAT_TEMPLATE: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<image>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

DESCRIBE: Final = (
    "describe the image.",
    "what do you see?",
    "what does the image show?",
    "describe what you see.",
    "give a description of the image.",
)
"""Instructions that are answered with a caption in language A."""

_WORD_PATTERN: Final = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_PYTHON_WORD: Final = re.compile(r" ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s")
_PRETRAINING_SEED: Final = 1_000_000
"""Scenes of the pretraining live in worlds from this seed on; no data set of the lab uses those."""


def attribute_words() -> tuple[str, ...]:
    """Every word of both languages that says something about a scene (``top left`` counts as two)."""
    words = {word for phrase in SYNONYMS for word in phrase.split()}
    words |= {word for synonyms in SYNONYMS.values() for word in synonyms}
    return tuple(sorted(words | set(ROWS) | set(COLUMNS) | {"zero", "yes", "no", "thing", "things"}))


def words_of(text: str) -> Iterator[tuple[str, int, int]]:
    """The words of lab text as the tokenizer splits them, each with the space before it, and their first and end."""
    for match in _PYTHON_WORD.finditer(text):
        yield match.group(), *match.span()


def train_tokenizer(vocabulary_size: int, *, scenes: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the lab's own sentences: any text encodes, every lab word is one token.

    The vocabulary is filled up to exactly ``vocabulary_size`` with unused tokens.

    Raises:
        ValueError: if an attribute word did not become one token (the vocabulary is too small).
    """
    rng = random.Random("tokenizer")
    lines: list[str] = []
    for index in range(scenes):
        scene = draw_scene(_PRETRAINING_SEED - 1, index)
        lines += [caption(scene, language, rng).text for language in LANGUAGES]
        lines += [question.text for kind in KINDS if (question := ask(scene, kind, rng))]
    bare = [word for word in attribute_words() for _ in range(20)]
    lines += bare + [f" {word}" for word in bare] + list(DESCRIBE) * 20 + ["user", "assistant", "system"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    spare = vocabulary_size - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|unused_{index}|>" for index in range(spare)])
    broken = [
        f"{lead}{word}" for word in attribute_words() for lead in ("", " ") if len(tokenizer.encode(lead + word)) > 1
    ]
    if broken:
        raise ValueError(f"a vocabulary of {vocabulary_size} splits the words {broken[:8]}; make it larger")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, IMAGE],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Encodes lab text with a memory per word: tens of times faster than a call of the tokenizer per sentence."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._memory: dict[str, list[int]] = {}
        self.newline = self.words("\n")[0]
        self.end_of_text, self.turn_start, self.turn_end, self.image = (
            tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS
        )
        self.user = [self.turn_start, *self.words("user\n")]
        self.assistant = [self.turn_start, *self.words("assistant\n")]

    def words(self, text: str) -> list[int]:
        """Token ids of lab text (ASCII, no special tokens)."""
        ids: list[int] = []
        for word in _PYTHON_WORD.findall(text):
            if word not in self._memory:
                self._memory[word] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            ids += self._memory[word]
        return ids


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the training stream is mixed. Shares of sequences; what is left over is question answering."""

    fewest_objects: int = 1
    most_objects: int = MAX_OBJECTS
    captions: float = 0.20
    """Plain language-A captions, each with its newline, all tokens supervised."""
    twins: float = 0.7
    """Share of plain captions that follow another one of the same scene: to say again what the context shows is what
    an LLM learns from any large text, and what a connector can build on."""
    describe: float = 0.10
    """Instructions to describe, answered with another caption of the same scene."""
    compact: float = 0.10
    """A description and lines of ``question answer`` without chat marks: the answer follows its question directly."""
    synonyms: float = 0.12
    """Share of B's words in A's grammar among the descriptions of questions and instructions."""
    raw_b: float = 0.0005
    """Share of language B among descriptions and among plain captions."""
    caption_weight: float = 0.25
    """Loss weight of a token of a plain caption; an answer's token has 1."""
    context_weight: float = 0.1
    """Loss weight of a token of descriptions and questions in the compact form."""
    kinds: tuple[tuple[str, float], ...] = tuple((kind, 1.0) for kind in KINDS)


class Sequence:
    """Token ids and loss weights of one training sequence under way."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []

    def add(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


class Stream:
    """An endless, reproducible stream of batches. ``seed`` and the number of batches drawn fix everything."""

    def __init__(self, encoder: Encoder, seed: int, batch: int, length: int) -> None:
        self._encoder = encoder
        self._seed = seed
        self._batch = batch
        self._length = length

    def batch(self, step: int, mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number ``step``: ids_BL (int64) and weights_BL (float32; 0 is not supervised)."""
        rng = random.Random(f"pretrain:{self._seed}:{step}")
        ids_BL = torch.full((self._batch, self._length), self._encoder.end_of_text)
        weights_BL = torch.zeros(self._batch, self._length)
        for row in range(self._batch):
            index = step * self._batch + row
            sequence = self._sequence(index, mixture, rng)
            ids = sequence.ids[: self._length]
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            weights_BL[row, : len(ids)] = torch.tensor(sequence.weights[: self._length])
        return ids_BL, weights_BL

    def _scene(self, index: int, mixture: Mixture, rng: random.Random) -> Scene:
        return draw_scene(
            _PRETRAINING_SEED + self._seed + rng.randrange(1 << 30),
            index,
            minimum=mixture.fewest_objects,
            maximum=mixture.most_objects,
        )

    def _sequence(self, index: int, mixture: Mixture, rng: random.Random) -> Sequence:
        sequence = Sequence()
        dice = rng.random()
        if dice < mixture.captions:
            self._captions(sequence, index, mixture, rng)
        elif dice < mixture.captions + mixture.compact:
            self._compact(sequence, index, mixture, rng)
        else:
            describe = dice < mixture.captions + mixture.compact + mixture.describe
            self._chat(sequence, index, mixture, rng, describe=describe)
        return sequence

    def _captions(self, sequence: Sequence, index: int, mixture: Mixture, rng: random.Random) -> None:
        """Plain documents as stage 1 and 2 write them: caption, newline; the separator only between documents."""
        encoder = self._encoder
        while len(sequence.ids) < self._length:
            scene = self._scene(index, mixture, rng)
            if rng.random() < mixture.twins:
                first = caption(scene, "a", rng, synonyms=rng.random() < mixture.synonyms).text
                sequence.add([*encoder.words(first), encoder.newline], mixture.caption_weight)
            text = caption(scene, "b" if rng.random() < mixture.raw_b else "a", rng).text
            sequence.add([*encoder.words(text), encoder.newline, encoder.end_of_text], mixture.caption_weight)

    def _compact(self, sequence: Sequence, index: int, mixture: Mixture, rng: random.Random) -> None:
        encoder = self._encoder
        scene = self._scene(index, mixture, rng)
        synonyms = rng.random() < mixture.synonyms
        text = caption(scene, "a", rng, synonyms=synonyms).text + "\n"
        sequence.add(encoder.words(text), mixture.context_weight)
        for question, answer in self._turns(scene, mixture, rng, describe=False):
            line, reply = encoder.words(question), encoder.words(f" {answer}")
            if len(sequence.ids) + len(line) + len(reply) + 1 > self._length:
                return
            sequence.add(line, mixture.context_weight)
            sequence.add(reply, 1.0)
            sequence.add([encoder.newline], mixture.context_weight)

    def _chat(self, sequence: Sequence, index: int, mixture: Mixture, rng: random.Random, *, describe: bool) -> None:
        """A description, then as many turns about it as fit."""
        encoder = self._encoder
        scene = self._scene(index, mixture, rng)
        synonyms = rng.random() < mixture.synonyms
        raw = rng.random() < mixture.raw_b and len(scene.things) < MAX_OBJECTS - 1
        language: Language = "b" if raw else "a"
        opening = encoder.words(caption(scene, language, rng, synonyms=synonyms).text + "\n")
        for question, answer in self._turns(scene, mixture, rng, describe):
            turn = [
                *encoder.user,
                *opening,
                *encoder.words(question),
                encoder.turn_end,
                encoder.newline,
                *encoder.assistant,
            ]
            reply = [*encoder.words(answer), encoder.turn_end]
            if len(sequence.ids) + len(turn) + len(reply) > self._length:
                if sequence.ids:
                    return
                continue
            sequence.add(turn, 0.0)
            sequence.add(reply, 1.0)
            sequence.add([encoder.newline], 0.0)
            opening = []

    def _turns(self, scene: Scene, mixture: Mixture, rng: random.Random, describe: bool) -> Iterator[tuple[str, str]]:
        if describe:
            yield rng.choice(DESCRIBE), caption(scene, "a", rng).text
        asked: set[str] = set()
        names = [name for name, _ in mixture.kinds]
        shares = [share for _, share in mixture.kinds]
        for _ in range(40):
            question = ask(scene, rng.choices(names, shares)[0], rng)
            if question is not None and question.text not in asked:
                asked.add(question.text)
                yield question.text, question.answer
