"""Makes the table of the drafter `phrases` for a model's vocabulary, of answers like those that it was trained on.

    python runs/phrases.py train.jsonl                # {"response": …} each, for the embedded model

The table changes no answer, only how fast it comes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pastalm.engines.drafts import phrases
from pastalm.models import loading
from pastalm.models.downloads import EMBEDDED
from pastalm.records import jsonl

MOST = 8000
"""Characters of a text that are read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, help="JSONL with `response`")
    parser.add_argument("--model", default=EMBEDDED)
    chosen = parser.parse_args()
    vocabulary = loading.load_tokenizer(chosen.model).vocabulary
    texts = [vocabulary.encode(row["response"][:MOST]) for _, row in jsonl.read(chosen.texts)]
    file = phrases.FOLDER / f"{phrases.fingerprint(vocabulary)}.npz"
    print(f"{file}: {phrases.write(file, texts)} contexts of {sum(map(len, texts))} tokens")


if __name__ == "__main__":
    main()
