"""The wired first weights: heads look where the docstring says, before any training."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from dpa.lab.pretrain_llm import Settings, build_model
from dpa.lab.pretrain_text import Encoder, train_tokenizer

TEXT = (
    "there is a large plain blue star top right. we see a small dotted green cross middle left. "
    "there is a small striped red circle top left.\nwhat colour is the thing top left?"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(Settings().vocabulary)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.set_num_threads(1)
    return build_model(Settings(), tokenizer)


@pytest.fixture(scope="module")
def attentions(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, ...]:
    ids_BL = torch.tensor([Encoder(tokenizer).words(TEXT)])
    with torch.no_grad():
        return tuple(layer[0] for layer in model(input_ids=ids_BL, output_attentions=True).attentions)


@pytest.mark.parametrize("head", [0, 1, 2])
def test_first_layer_looks_back(attentions: tuple[torch.Tensor, ...], head: int) -> None:
    offset = head + 1
    assert float(attentions[0][head].diagonal(-offset)[10:].min()) > 0.6


@pytest.mark.parametrize("head", [0, 1, 2])
def test_carriers_look_six_back(attentions: tuple[torch.Tensor, ...], head: int) -> None:
    for layer in (2, 3):
        assert float(attentions[layer][head].diagonal(-6)[10:].mean()) > 0.6


@pytest.mark.parametrize("head", [1, 2, 3, 4, 5])
def test_a_question_finds_its_place(
    attentions: tuple[torch.Tensor, ...], tokenizer: PreTrainedTokenizerFast, head: int
) -> None:
    """``top left`` in the question finds ``top left`` in the description, not ``middle left``, nor itself."""
    tokens = tokenizer.convert_ids_to_tokens(Encoder(tokenizer).words(TEXT))
    here = len(tokens) - 2
    assert tokens[here] == "Ġleft"
    sought = next(i for i in range(1, here) if tokens[i - 1 : i + 1] == ["Ġtop", "Ġleft"])
    assert float(attentions[1][head][here, sought]) > 0.6


def test_other_shapes_of_model_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="4 heads; the wiring needs 6"):
        build_model(Settings(hidden=128), tokenizer)
