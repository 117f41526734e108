"""Adapters: PEFT LoRA plus the embedding rows of the six tag tokens, and the card (pasta.json) of each.

An adapter is merged when it is loaded. The card says what it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pastalm.errors import ModelError
from pastalm.models import checkpoints
from pastalm.models.checkpoints import quiet

SHIPPED = Path(__file__).parents[1] / "adapters"
_CARD = "pasta.json"


def adapter_folder(name: str, adapter: str | None) -> Path | None:
    """The folder of the adapter that `load` merges; None if there is none. Raises ModelError if it does not exist."""
    if adapter is None:
        return None
    if adapter != "auto":
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"no adapter at {adapter}: a folder with adapter_config.json is needed")
        return Path(adapter)
    if Path(name).name != name:
        return None
    shipped = SHIPPED / name.lower()
    return shipped if (shipped / "adapter_config.json").is_file() else None


def read_card(folder: Path) -> dict[str, Any]:
    """The card of an adapter (pasta.json). Raises ModelError if it is missing or invalid."""
    try:
        card: dict[str, Any] = json.loads((folder / _CARD).read_text())
        return card
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {_CARD}: give the folder of an adapter made with pastalm") from None
    except ValueError:
        raise ModelError(f"{folder / _CARD} is not JSON: get the adapter again") from None


def sequential_marker(folder: Path) -> str | None:
    """What the system message of a sequential answer contains, by the card of an adapter or a merged model.

    None if there is no card, or the model was trained without such a marker. Raises ModelError if the card is invalid.
    """
    return read_card(folder).get("sequential_marker") if (folder / _CARD).is_file() else None


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes pasta.json."""
    (folder / _CARD).write_text(json.dumps(dict(card), indent=2) + "\n")


def shape_of(model: Any) -> dict[str, Any]:
    """The properties that an adapter and its base model must share."""
    text = model.config.get_text_config(decoder=True)
    return {
        "model_type": model.config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


def check_base(card: Mapping[str, Any], model: Any, adapter: Path) -> None:
    """Raises ModelError if the adapter was made for a different base model."""
    if card.get("shape") != shape_of(model):
        raise ModelError(
            f"the adapter in {adapter} was made for {card.get('base')}, not for this model: "
            "give another with --adapter, or none"
        )


def load_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter merged; not merged if the weights are quantised. Raises ModelError."""
    check_base(read_card(adapter), model, adapter)
    return merge(model, adapter)


def merge(model: Any, adapter: Path) -> Any:
    """The model with the adapter merged, without a check of its card. Raises ModelError if it cannot be read."""
    from peft import PeftModel

    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, str(adapter))
            # merging into quantised weights would round the adapter
            return adapted.get_base_model() if checkpoints.is_quantised(model) else adapted.merge_and_unload()
    except Exception as error:
        raise ModelError(f"cannot read the adapter in {adapter}: {checkpoints.first_line(error)}") from None
