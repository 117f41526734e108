"""A base model of another family for `second_family.sh`: Qwen3, random weights, a tokenizer of its own.

    python runs/second_family.py ANNOTATED.jsonl FOLDER

Some 0.9 million weights; a byte-level BPE of 2,048 tokens, trained on the prompts and answers of ANNOTATED, which
splits words as Qwen's does; Qwen's chat template.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pattern of words."""


def main(
    data: Annotated[Path, typer.Argument(help="what pasta annotate wrote")],
    folder: Annotated[Path, typer.Argument(help="of the model; a folder that is whole stays as it is")],
    vocabulary: int = VOCABULARY,
    hidden: int = 128,
    layers: int = 3,
    seed: int = 0,
) -> None:
    """Writes a Qwen3 model of random weights and a tokenizer of its own."""
    from pastalm.models import checkpoints

    if (folder / "tokenizer.json").is_file():
        return
    tokenizer = tokenizer_of(_texts(data), vocabulary)
    model = _model(len(tokenizer), hidden, layers, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    checkpoints.save(model, tokenizer, folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters())} weights, {len(tokenizer)} tokens")


def _texts(data: Path) -> Iterator[str]:
    from pastalm.records import jsonl
    from pastalm.records.documents import parse, strip

    for _, row in jsonl.read(data):
        yield row["prompt"]
        yield strip(parse(row["annotated"]))


def tokenizer_of(texts: Iterator[str], size: int) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _model(vocabulary: int, hidden: int, layers: int, seed: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 96 * 32 or 32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


if __name__ == "__main__":
    typer.run(main)
