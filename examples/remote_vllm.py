"""Decodes with threads over a completions server that you have, unpatched: vLLM, SGLang, llama.cpp's.

    vllm serve FOLDER --served-model-name mine
    python examples/remote_vllm.py "Give me five tips." --model mine --tokenizer FOLDER --base-url http://127.0.0.1:8000/v1

FOLDER holds a finetuned model (docs/engines.md). Any other one is taught the tags in its prompt: add --prompted.
"""

from __future__ import annotations

import argparse

from pastalm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="its name on the server")
    parser.add_argument("--tokenizer", help="a hub name or folder with its tokenizer and chat template")
    parser.add_argument("--prompted", action="store_true")
    chosen = parser.parse_args()

    server = {"tokenizer": chosen.tokenizer, "prompted": chosen.prompted}
    with LLM.remote(chosen.base_url, chosen.model, **server) as llm:
        messages = [{"role": "user", "content": chosen.prompt}]
        answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=256))[0].outputs[0]
    print(answer.text)
    for path, thread in answer.transcript.threads.items():
        print("main" if not path else ".".join(map(str, path)), thread.topic, thread.tokens, "tokens", sep="\t")


if __name__ == "__main__":
    main()
