"""The end that training teaches is the one that the chat template writes, whatever else a model lists."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from pastalm.errors import ModelError
from pastalm.models import checkpoints, end_tokens
from pastalm.train import run
from tests.test_models import byte_level, small_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
NO_ANSWERS = (
    "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
)


def tokenizer_of(template: str | None, specials: list[str], eos: str | None) -> PreTrainedTokenizerFast:
    """A small tokenizer with a template and special tokens of a known shape; their ids ascend as they are listed."""
    core = byte_level().backend_tokenizer.to_str().replace("<|im_start|>", "<|0|>").replace("<|im_end|>", "<|1|>")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core))
    made.add_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    made.chat_template, made.eos_token = template, eos
    return made


SHAPES: dict[str, tuple[str | None, list[str], str | None, list[str], str]] = {
    # template, special tokens, the tokenizer's end, the ends that generation_config lists, what is taught
    "Qwen": (
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        ["<|im_end|>", "<|endoftext|>"],
        "<|im_end|>",
    ),
    "Qwen, a base's end": (
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|endoftext|>",
        ["<|endoftext|>"],
        "<|im_end|>",
    ),
    "Llama 3": (
        LLAMA_3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        ["<|end_of_text|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "Llama 2": (LLAMA_2, ["<s>", "</s>"], "</s>", ["</s>"], "</s>"),
    "Phi 3": (
        PHI_3,
        ["<|endoftext|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        ["<|endoftext|>", "<|end|>"],
        "<|end|>",
    ),
    "no token of its own": (BARE, ["<|first|>", "<|second|>"], "<|second|>", ["<|first|>", "<|second|>"], "<|second|>"),
    "the tokenizer's is none of them": (BARE, ["<|a|>", "<|b|>", "<|c|>"], "<|c|>", ["<|b|>", "<|a|>"], "<|b|>"),
    "takes no answers": (NO_ANSWERS, ["<|a|>", "<|b|>"], "<|b|>", ["<|a|>", "<|b|>"], "<|b|>"),
    "no template": (None, ["<|a|>", "<|b|>"], "<|b|>", ["<|a|>", "<|b|>"], "<|b|>"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_training_ends_an_answer_as_the_chat_template_does(shape: str) -> None:
    template, specials, eos, listed, wanted = SHAPES[shape]
    tokenizer = tokenizer_of(template, specials, eos)
    model = small_model(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in listed]
    assert end_tokens.taught_end(model, tokenizer) == tokenizer.convert_tokens_to_ids(wanted)
    ends = end_tokens.end_tokens(model, tokenizer)
    assert end_tokens.taught_end(model, tokenizer) in ends, "decoding stops where training did"
    assert set(model.generation_config.eos_token_id) <= ends


def test_a_run_teaches_that_end(tmp_path: Path) -> None:
    template, specials, eos, listed, wanted = SHAPES["Llama 3"]
    tokenizer = tokenizer_of(template, specials, eos)
    model: Any = small_model(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in listed]
    checkpoints.save(model, copy.deepcopy(tokenizer), tmp_path / "base")
    (tmp_path / "d").write_text("")
    base = run.begin(run.RunConfig(data=tmp_path / "d", out=tmp_path / "o", model=str(tmp_path / "base")), str)
    assert base.eos == tokenizer.convert_tokens_to_ids(wanted)
    assert base.eos in base.vocabulary.eos


def test_a_model_without_any_end_is_refused() -> None:
    tokenizer = tokenizer_of(BARE, [], None)
    model = small_model(len(tokenizer))
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="has no token that ends"):
        end_tokens.taught_end(model, tokenizer)
