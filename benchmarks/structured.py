"""Structured output: fields as threads against one thread under the same grammar, on texts with known values.

    python benchmarks/structured.py benchmarks/extraction.jsonl --limit 50 --rounds 3 --out FILE
    python benchmarks/structured.py benchmarks/extraction.jsonl --limit 50 --remembered prompt
    python benchmarks/structured.py benchmarks/extraction.jsonl --limit 10 --llama-cpp q8_0.gguf --transformers
    python benchmarks/structured.py benchmarks/extraction.jsonl --limit 20 --remote http://127.0.0.1:8000/v1 --model M
    python benchmarks/structured.py --agreement 60
    python benchmarks/structured.py --schemas tests/structured/schemas.jsonl tests/structured/functions.jsonl --seeds 4

The first form takes `--limit` rows, spread evenly over those with 4 to 12 fields. It answers each with threads and
sequentially, one at a time, alternately, greedy, without drafts unless --drafts says otherwise, and gives: how much
faster the whole answer is (medians of the rounds by row; geometric mean over rows with a 95 % bootstrap interval),
fields that are right and that agree. `--remembered` says what the prefix cache holds of a row before it is asked:
`schema`, as a server has it that is asked with one schema and text after text; `prompt`, so that decoding alone is
timed; or `none`. `--llama-cpp` adds llama.cpp's own grammar (its JSON Schema converter) on that GGUF file,
`--transformers` llguidance on transformers' `generate`: their own sequential forms, in the same run. `--remote` asks a
vLLM server: a completion a field against its own structured output of the whole schema; its prefix cache is its own.

`--agreement N` samples N answers of two fields that must fit each other, a fruit and a sentence about it, and counts
the sentences that name that fruit: fields that do not see each other, with `x-depends-on`, sequentially.

The last form samples an answer to each schema with each seed at temperature 1, and counts those that do not validate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pastalm import LLM, SamplingParams
from pastalm.core.events import Decoded
from pastalm.engines.batching import BatchingEngine
from pastalm.errors import RequestError
from pastalm.structured.structures import instructions

MAX_TOKENS = 400


def fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Names and values of all that is no object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from fields(inner, (*path, key))
    else:
        yield path, value


def interval(values: list[float], of: Callable[[Any], float]) -> str:
    rng = np.random.default_rng(0)
    draws = [of(rng.choice(values, len(values))) for _ in range(2000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{of(values):.2f} ({low:.2f} to {high:.2f})"


def geometric(values: Any) -> float:
    return float(np.exp(np.log(np.asarray(values)).mean()))


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["text"]}]


class Ours:
    """One engine of ours, with threads or sequentially. remembered: none, schema or prompt."""

    def __init__(self, llm: LLM, *, parallelism: float, drafts: str, remembered: str) -> None:
        self.llm, self.parallelism, self.drafts, self.remembered = llm, parallelism, drafts, remembered

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(
            schema=row["schema"],
            temperature=0,
            max_tokens=MAX_TOKENS,
            parallelism=self.parallelism,
            drafts=self.drafts,
        )
        if isinstance(engine := self.llm.driver.engine, BatchingEngine):
            engine.forget()
        if self.remembered != "none":
            known = row if self.remembered == "prompt" else row | {"text": "A text."}
            for event in self.llm.submit(messages(known), params, keep_events=True):
                if isinstance(event, Decoded):
                    break
        begun = time.perf_counter()
        response = self.llm.submit(messages(row), params, keep_events=True)
        for _ in response:
            pass
        transcript = response.transcript
        return {
            "text": transcript.text,
            "seconds": time.perf_counter() - begun,
            "passes": transcript.passes,
            "tokens": transcript.tokens,
        }


class Served:
    """A vLLM server's own structured output, streamed: the same prompt, one completion."""

    def __init__(self, llm: LLM, url: str, model: str) -> None:
        import openai

        self.llm, self.model = llm, model
        self.client = openai.OpenAI(base_url=url, api_key="none")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(schema=row["schema"], temperature=0, max_tokens=MAX_TOKENS)
        prompt = self.llm.driver.engine.wire.prompt(self.llm.encode(messages(row), params))  # type: ignore[attr-defined]
        begun = time.perf_counter()
        stream = self.client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"structured_outputs": {"json": row["schema"]}},
        )
        parts = [chunk.choices[0].text for chunk in stream if chunk.choices]
        return {"text": "".join(parts), "seconds": time.perf_counter() - begun, "passes": len(parts)}


class LlamaCpp:
    """llama.cpp's own grammar for JSON Schemas, its own loop."""

    def __init__(self, gguf: str) -> None:
        from llama_cpp import Llama

        self.model = Llama(gguf, n_ctx=2048, verbose=False, n_threads=2)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from llama_cpp import LlamaGrammar

        system = instructions(SamplingParams(schema=row["schema"]))
        asked = [{"role": "system", "content": system}, *messages(row)]
        begun = time.perf_counter()
        grammar = LlamaGrammar.from_json_schema(json.dumps(row["schema"]), verbose=False)
        reply = self.model.create_chat_completion(asked, grammar=grammar, temperature=0, max_tokens=MAX_TOKENS)
        return {
            "text": reply["choices"][0]["message"]["content"],
            "seconds": time.perf_counter() - begun,
            "tokens": reply["usage"]["completion_tokens"],
        }


class Transformers:
    """llguidance as a logits processor of transformers' `generate`, bfloat16."""

    def __init__(self) -> None:
        from pastalm.models import loading
        from pastalm.models.downloads import EMBEDDED

        self.loaded: Any = loading.load(EMBEDDED, adapter=None, dtype="bfloat16")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import torch
        from transformers import LogitsProcessorList

        from pastalm.models import chat_template
        from pastalm.structured.grammar import Grammars
        from pastalm.structured.plan import plan

        params = SamplingParams(schema=row["schema"])
        begun = time.perf_counter()
        ids = chat_template.chat_prompt(self.loaded, messages(row), marker=instructions(params))
        value = Grammars(self.loaded.vocabulary).value(plan(row["schema"], parallel=False), "")  # type: ignore[arg-type]
        written = len(ids)

        def mask(tokens: Any, scores: Any) -> Any:
            nonlocal written
            for token in tokens[0, written:].tolist():
                value.write(token)
            written = tokens.shape[1]
            scores[0, ~torch.from_numpy(value.mask().copy())] = -torch.inf
            return scores

        out = self.loaded.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            logits_processor=LogitsProcessorList([mask]),
            eos_token_id=sorted(self.loaded.vocabulary.eos),
            pad_token_id=0,
        )
        answer = out[0, len(ids) :].tolist()
        return {
            "text": self.loaded.vocabulary.text(answer),
            "seconds": time.perf_counter() - begun,
            "tokens": len(answer),
        }


def extraction(args: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines()]
    rows = [row for row in rows if 4 <= len(list(fields(row["values"]))) <= 12]
    rows = [rows[i * len(rows) // args.limit] for i in range(args.limit)] if args.limit < len(rows) else rows
    systems: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]
    if args.remote:
        llm = LLM.remote(args.remote, args.model, tokenizer=args.tokenizer)
        systems = {
            "threads": Ours(llm, parallelism=1.0, drafts="off", remembered=args.remembered),
            "sequential": Served(llm, args.remote, args.model),
        }
    else:
        llm = LLM(adapter=None, dtype=args.dtype, max_num_seqs=1)
        systems = {
            name: Ours(llm, parallelism=parallelism, drafts=args.drafts, remembered=args.remembered)
            for name, parallelism in (("threads", 1.0), ("sequential", 0.0))
        }
    if args.llama_cpp:
        systems["llama.cpp"] = LlamaCpp(args.llama_cpp)
    if args.transformers:
        systems["transformers"] = Transformers()
    results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in systems}
    for number, row in enumerate(rows):
        for name, system in systems.items():
            if number == 0:
                system(row)
            results[name].append([])
        for _ in range(args.rounds):
            for name, system in systems.items():
                results[name][-1].append(system(row))
        print(f"{number + 1}/{len(rows)}", end="\r", file=sys.stderr)
    report(rows, results)
    if args.out:
        Path(args.out).write_text(json.dumps({"rows": [row["id"] for row in rows], **results}))


def report(rows: list[dict[str, Any]], results: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Prints the table."""

    def times(name: str, key: str) -> list[float]:
        return [statistics.median(one[key] for one in each) for each in results[name]]

    def parsed(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return {}

    answers = {name: [dict(fields(parsed(each[0]["text"]))) for each in result] for name, result in results.items()}
    for name in results:
        right, same = [], []
        for row, own, sequential in zip(rows, answers[name], answers["sequential"], strict=True):
            want = dict(fields(row["values"]))
            right.append(sum(own.get(k) == v for k, v in want.items()) / len(want))
            same.append(sum(own.get(k) == v for k, v in sequential.items()) / max(1, len(sequential)))
        line = [f"{name}: right {interval(right, np.mean)}", f"as sequential {interval(same, np.mean)}"]
        line.append(f"{statistics.median(times(name, 'seconds')) * 1e3:.0f} ms")
        if name != "threads":
            ratios = [a / b for a, b in zip(times(name, "seconds"), times("threads", "seconds"), strict=True)]
            line.append(f"threads are {interval(ratios, geometric)} times as fast")
        if name == "sequential":
            passes = [a / b for a, b in zip(times(name, "passes"), times("threads", "passes"), strict=True)]
            line.append(f"in passes {interval(passes, geometric)}")
        print("; ".join(line))
    differences = []
    for row, own, sequential in zip(rows, answers["threads"], answers["sequential"], strict=True):
        want = dict(fields(row["values"]))
        differences.append(sum((own.get(k) == v) - (sequential.get(k) == v) for k, v in want.items()) / len(want))
    print(f"right, threads less sequential: {interval(differences, np.mean)}")


FRUITS = ("apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum")


def agreement(args: argparse.Namespace) -> None:
    llm = LLM(args.model, adapter=None, dtype=args.dtype, max_num_seqs=16)
    asked = [{"role": "user", "content": "Choose a fruit at random, and write one short sentence about it."}]
    sentence = {"type": "string", "maxLength": 80}
    for name, more, parallelism in (
        ("threads", {}, 1.0),
        ("threads, x-depends-on", {"x-depends-on": ["fruit"]}, 1.0),
        ("sequential", {}, 0.0),
    ):
        properties = {"fruit": {"enum": list(FRUITS)}, "sentence": sentence | more}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        params = SamplingParams(
            schema=schema, seed=5, n=args.agreement, max_tokens=80, parallelism=parallelism, drafts="off"
        )
        answers = [json.loads(output.text) for output in llm.chat(asked, params)[0].outputs]
        fit = sum(answer["fruit"] in answer["sentence"].lower() for answer in answers)
        some = sum(any(fruit in answer["sentence"].lower() for fruit in FRUITS) for answer in answers)
        print(f"{name}: {fit} of {len(answers)} sentences name the fruit, {some} name some fruit")


def schemas(args: argparse.Namespace) -> None:
    import jsonschema_rs

    rows = [json.loads(line) for path in args.schemas for line in Path(path).read_text().splitlines()]
    llm = LLM(args.model, adapter=None, dtype=args.dtype, max_num_seqs=16)
    invalid = count = refused = shortened = 0
    for parallelism in (1.0, 0.0):
        for begin in range(0, len(rows), 16):
            submitted = []
            for row in rows[begin : begin + 16]:
                for seed in range(args.seeds):
                    params = SamplingParams(schema=row["schema"], max_tokens=300, seed=seed, parallelism=parallelism)
                    try:
                        prompt: Any = [{"role": "user", "content": f"Make up data: {row['name']}."}]
                        submitted.append((row, llm.submit(prompt, params, keep_events=False)))
                    except RequestError as error:
                        refused += 1
                        print(row["name"], error)
            llm.driver.run([response for _, response in submitted])
            for row, response in submitted:
                text = response.transcript.text
                shortened += response.transcript.finish_reason == "length"
                count += 1
                try:
                    assert jsonschema_rs.is_valid(row["schema"], json.loads(text))
                except (ValueError, AssertionError):
                    invalid += 1
                    print("does not validate:", row["name"], text[:200])
            print(f"{count} answers, {invalid} invalid", end="\r", file=sys.stderr)
    print(f"{count} answers: {invalid} do not validate, {refused} refused, {shortened} ended by their budget")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--drafts", default="off")
    parser.add_argument("--remembered", choices=("none", "schema", "prompt"), default="schema")
    parser.add_argument("--llama-cpp")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--remote", help="a vLLM server's API, and --model its name there")
    parser.add_argument("--tokenizer", help="folder of the remote model's tokenizer, where its name is none")
    parser.add_argument("--out")
    parser.add_argument("--schemas", nargs="+")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--agreement", type=int, default=0)
    args = parser.parse_args()
    agreement(args) if args.agreement else schemas(args) if args.schemas else extraction(args)


if __name__ == "__main__":
    main()
