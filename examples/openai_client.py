"""Asks a running `pasta serve` through the openai package, and prints the answer as it comes.

pasta serve &
python examples/openai_client.py "Give me five tips for staying healthy." --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import os
import sys

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    chosen = parser.parse_args()

    client = OpenAI(base_url=chosen.base_url, api_key=os.environ.get("PASTA_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": chosen.prompt}],
        temperature=0,
        max_tokens=512,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"pasta": {"parallelism": 1.0}},  # 0: the same model without threads
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.model_extra['pasta']}", file=sys.stderr)


if __name__ == "__main__":
    main()
