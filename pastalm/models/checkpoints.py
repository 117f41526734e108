"""Reads transformers checkpoints from a folder, and saves them.

A multimodal checkpoint is loaded as the causal language model of its text part. Quantised weights stay quantised. Code
that comes with a checkpoint runs only with trust_remote_code; there is never a question on the terminal. A checkpoint
with missing weights is rejected, since transformers would initialise them at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pastalm.errors import ModelError

ALLOWED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Files of a hub repository that a model may be read from."""
IGNORED = (
    *("*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.tiktoken", "*/*.py", "*/*.bin"),
    *("consolidated*", "*.fp16.*", "*.fp16-*", "*.fp32.*", "*.fp32-*", "tf_model*", "flax_model*", "training_args*"),
)
"""Duplicates of the weights in other formats: original/, onnx/, consolidated.safetensors."""
OLDER_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Downloaded if a repository has no safetensors."""

TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
"""Types of text parts for which transformers has no causal language model; the type that computes the same for text,
where each position is one number; and further settings of that type."""
_TEXT_WEIGHTS = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.(language_model|text_model)\.": "model.",
    r"^language_model\.": "model.",
}
"""Renames the weights of a multimodal checkpoint's text part."""


class quiet:
    """Keeps transformers' progress bars and warnings off the terminal."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level, self._bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bar:
            logging.enable_progress_bar()


def read(
    folder: Path, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Loads model and tokenizer from a folder.

    folder: a saved checkpoint.
    dtype: of the weights; quantised weights keep theirs.
    device: for quantised weights; others are loaded on the CPU.
    trust_remote_code: run Python code that comes with the checkpoint.

    Raises ModelError.
    """
    from transformers import AutoConfig, AutoTokenizer

    with refusing(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    method = quantised_by(config)
    _check_method(method, folder)
    text = _text_part(config, folder)
    options: dict[str, Any] = {"dtype": dtype if method is None else "auto", "trust_remote_code": trust_remote_code}
    if text is not config:
        options |= {"config": text, "key_mapping": _TEXT_WEIGHTS}
    if method is not None and device != "cpu":
        options["device_map"] = device
    with refusing(folder, method):
        model = _weights(folder, options)
    return model, tokenizer


def _weights(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    model, loading_info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    text = options.get("config")
    if set(loading_info["missing_keys"]) == {"lm_head.weight"} and text is not None and not text.tie_word_embeddings:
        text.tie_word_embeddings = True  # only the multimodal configuration has this setting
        return _weights(folder, options)
    if missing := sorted(loading_info["missing_keys"]):
        raise ModelError(f"{folder} lacks weights ({missing[0]}, {len(missing)} in all): get the model again")
    if text is not None:
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        text.tie_word_embeddings = model.config.tie_word_embeddings = head.data_ptr() == table.data_ptr()
        # otherwise transformers would save it under the original names, which fails
        model._weight_conversions = [
            step for step in model._weight_conversions or () if not set(step.source_patterns) & set(_TEXT_WEIGHTS)
        ]
    return model


def _text_part(config: Any, folder: Path) -> Any:
    """The configuration of the text part; all of it for a text-only model. Raises ModelError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config(decoder=True)
    if text is config or config.is_encoder_decoder:
        return config
    if (twin := TWINS.get(text.model_type)) is not None:
        text = _as_twin(text, *twin)
    elif text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"cannot load the model in {folder}: transformers has no language model for the text part "
            f"({text.model_type}) of a {config.model_type}"
        )
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = quantised
    return text


def _as_twin(text: Any, twin: str, more: dict[str, Any]) -> Any:
    """The text part's configuration as the type that computes the same for text (see TWINS)."""
    from dataclasses import fields

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[twin]
    rope = {k: v for k, v in (text.rope_parameters or {}).items() if not k.startswith("mrope")}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    values = {f.name: getattr(text, f.name) for f in fields(kind) if hasattr(text, f.name) and f.name != "model_type"}
    return kind(**(values | {"rope_parameters": rope} | more))


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Saves model (safetensors), tokenizer and chat template; loading them gives identical weights."""
    model.hf_quantizer = None  # transformers refuses to save a model read from GGUF while these are set
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def quantised_by(config: Any) -> str | None:
    """The quantisation method in the configuration; None if the weights are not quantised."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    method = (
        quantisation.get("quant_method")
        if isinstance(quantisation, dict)
        else getattr(quantisation, "quant_method", None)
    )
    return str(getattr(method, "value", method) or "an unnamed method")


def _check_method(method: str | None, folder: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method is not None and not any(supported.startswith(method) for supported in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ModelError(f"the weights in {folder} are quantised by an unknown method ({method}): use another model")


def is_quantised(model: Any) -> bool:
    """Whether a loaded model's weights are quantised; then their dtype and device cannot be changed."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None)


@contextmanager
def refusing(where: object, quantised: str | None = None, *, what: str = "the model", hint: str = "") -> Iterator[None]:
    """Turns errors of transformers into a one-line ModelError.

    where: the folder or name, for the message.
    quantised: the quantisation method, for the message.
    what: what is being loaded.
    hint: what the user can do.
    """
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_error_message(where, quantised, what, hint, error)) from None


def _error_message(where: object, quantised: str | None, what: str, hint: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"{where} comes with its own code, which was not run: if you trust it, give --trust-remote-code "
            "(LLM(trust_remote_code=True))"
        )
    if "Unrecognized configuration class" in text:
        return f"cannot load the model in {where}: transformers has no causal language model of this type"
    if quantised is not None:
        return f"cannot load the model in {where}, whose weights are quantised ({quantised}): {first_line(error)}"
    return f"cannot load {what} in {where}: {first_line(error)}{hint}"


def first_line(error: Exception) -> str:
    """The first line of an error message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
