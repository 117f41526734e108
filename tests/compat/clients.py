"""Clients of OpenAI's API, each as its users call it: `python clients.py NAME URL` asks the server there, whose model
is `played`, and prints what came as JSON. Runs in the clients' environment, where no pastalm is."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MODEL, KEY, SAID = "played", "secret", "Say hello."
HERE = Path(__file__).parent


def ask_openai(url: str) -> dict[str, Any]:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=KEY)
    messages: Any = [
        {"role": "developer", "content": "Be brief.", "name": "owner"},
        {"role": "user", "content": [{"type": "text", "text": SAID}]},
    ]
    more: Any = {
        "user": "u", "safety_identifier": "u", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": False,
        "service_tier": "auto", "verbosity": "low", "parallel_tool_calls": True,
    }  # fmt: skip
    whole = client.chat.completions.create(model=MODEL, messages=messages, **more)
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **more
    )
    chunks = list(stream)
    raw = client.completions.create(model=MODEL, prompt=SAID, max_tokens=400, user="u")
    assert chunks[-1].usage.total_tokens and client.models.retrieve(MODEL).id == MODEL
    return {
        "whole": whole.choices[0].message.content,
        "stream": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "raw": raw.choices[0].text,
    }


def ask_litellm(url: str) -> dict[str, Any]:
    import litellm

    messages = [{"role": "user", "content": SAID}]
    how: Any = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "messages": messages}
    whole = litellm.completion(**how, user="u")
    chunks = litellm.completion(**how, stream=True)
    as_vllm = litellm.completion(**{**how, "model": f"hosted_vllm/{MODEL}"})
    return {
        "whole": whole.choices[0].message.content,
        "stream": "".join(c.choices[0].delta.content or "" for c in chunks),
        "as vLLM": as_vllm.choices[0].message.content,
    }


def ask_langchain(url: str) -> dict[str, Any]:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY)
    history = [SystemMessage("Be brief."), HumanMessage(SAID, name="me"), AIMessage("Hello."), HumanMessage(SAID)]
    return {
        "whole": chat.invoke(history).content,
        "stream": "".join(chunk.content for chunk in chat.stream(history)),
        "batch": chat.batch([SAID, SAID])[1].content,
        "raw": OpenAI(model=MODEL, base_url=url, api_key=KEY, max_tokens=400).invoke(SAID),
    }


def ask_llama_index(url: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    made: Any = {"model": MODEL, "api_base": url, "api_key": KEY, "max_tokens": 400}
    chat = OpenAILike(**made, is_chat_model=True)
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=SAID)]
    return {
        "whole": chat.chat(messages).message.content,
        "stream": "".join(part.delta or "" for part in chat.stream_chat(messages)),
        "raw": OpenAILike(**made, is_chat_model=False).complete(SAID).text,
    }


def ask_agents(url: str) -> dict[str, Any]:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=url, api_key=KEY))
    agent = Agent(name="one", instructions="Be brief.", model=model)

    async def run() -> dict[str, Any]:
        first = await Runner.run(agent, SAID)
        again = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": SAID}])
        stream = Runner.run_streamed(agent, SAID)
        async for _ in stream.stream_events():
            pass
        return {"whole": first.final_output, "second turn": again.final_output, "stream": stream.final_output}

    return asyncio.run(run())


def ask_pydantic_ai(url: str) -> dict[str, Any]:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY)), instructions="Be brief.")

    async def streamed() -> str:
        async with agent.run_stream(SAID) as result:
            return str(await result.get_output())

    first = agent.run_sync(SAID)
    again = agent.run_sync(SAID, message_history=first.all_messages())
    return {"whole": first.output, "second turn": again.output, "stream": asyncio.run(streamed())}


def ask_autogen(url: str) -> dict[str, Any]:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelFamily
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info: Any = {
        "vision": False, "function_calling": False, "json_output": False, "structured_output": False,
        "family": ModelFamily.UNKNOWN,
    }  # fmt: skip

    async def run(stream: bool) -> str:
        client = OpenAIChatCompletionClient(model=MODEL, base_url=url, api_key=KEY, model_info=info)
        agent = AssistantAgent("one", client, system_message="Be brief.", model_client_stream=stream)
        await agent.run(task=SAID)
        return str((await agent.run(task=SAID)).messages[-1].content)  # type: ignore[union-attr]

    return {"second turn": asyncio.run(run(False)), "stream": asyncio.run(run(True))}


def ask_llm(url: str) -> dict[str, Any]:
    import llm
    from llm.default_plugins.openai_models import Chat, Completion

    chat = Chat("served", model_name=MODEL, api_base=url, key=KEY)
    conversation = chat.conversation()
    conversation.prompt(SAID, stream=False).text()
    raw = Completion("raw", model_name=MODEL, api_base=url, key=KEY)
    assert llm.__name__
    return {
        "second turn": conversation.prompt(SAID, stream=False, system="Be brief.").text(),
        "stream": "".join(chat.prompt(SAID)),
        "raw": raw.prompt(SAID, max_tokens=400).text(),
    }


def ask_lm_eval(url: str) -> dict[str, Any]:
    """A task that scores and one that generates, over rows of our own; what it got for each row."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.environ["OPENAI_API_KEY"] = KEY
    arguments = {
        "model": MODEL, "base_url": f"{url}/completions", "tokenizer_backend": "remote", "max_length": 200,
        "num_concurrent": 2, "max_retries": 1, "auth_token": KEY,
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        "local-completions",
        model_args=arguments,
        tasks=["pasta_scored", "pasta_written"],
        task_manager=TaskManager(include_path=str(HERE / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    samples: dict[str, Any] = found["samples"]
    chat = lm_eval.simple_evaluate(
        "local-chat-completions",
        model_args={"model": MODEL, "base_url": f"{url}/chat/completions", "max_retries": 1},
        tasks=["pasta_written"],
        task_manager=TaskManager(include_path=str(HERE / "tasks"), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return {
        "scored": [row(s) for s in samples["pasta_scored"]],
        "written": [row(s) for s in samples["pasta_written"]],
        "chat": [row(s) for s in chat["samples"]["pasta_written"]],
    }


def row(sample: dict[str, Any]) -> dict[str, Any]:
    """The row's number, and what came for each of its requests."""
    return {"row": sample["doc_id"], "got": list(flat(sample["resps"]))}


def flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list) and value and isinstance(value[0], list | tuple):
            yield from flat(value)
        else:
            yield value


# ------------------------------------------------------------------------------ JSON and tools

LION = "A lion is 110 cm high, weighs 190.5 kg, and is alive. How large is it?"


def size() -> Any:
    """What is asked for, as a pydantic model."""
    from pydantic import BaseModel

    class Size(BaseModel):
        """How large something is."""

        height_cm: int
        weight_kg: float
        alive: bool

    return Size


def json_openai(url: str) -> dict[str, Any]:
    from openai import OpenAI, pydantic_function_tool

    client, messages = OpenAI(base_url=url, api_key=KEY), [{"role": "user", "content": LION}]
    how: Any = {"model": MODEL, "messages": messages, "max_tokens": 200}
    parsed = client.chat.completions.parse(**how, response_format=size()).choices[0].message.parsed
    tools: Any = {"tools": [pydantic_function_tool(size())], "tool_choice": "required"}
    (call,) = client.chat.completions.parse(**how, **tools).choices[0].message.tool_calls or ()
    with client.chat.completions.stream(**how, **tools) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    return {
        "parsed": parsed.model_dump(),
        "called": call.function.parsed_arguments.model_dump(),
        "streamed": streamed[0].function.parsed_arguments.model_dump(),
    }


def json_litellm(url: str) -> dict[str, Any]:
    import litellm

    messages = [{"role": "user", "content": LION}]
    how: Any = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "messages": messages, "max_tokens": 200}
    tool = {"type": "function", "function": {"name": "note", "parameters": size().model_json_schema()}}
    called = litellm.completion(**how, tools=[tool], tool_choice="required").choices[0].message.tool_calls[0]
    chunks = list(litellm.completion(**how, tools=[tool], tool_choice="required", stream=True))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    content = litellm.completion(**how, response_format=size()).choices[0].message.content
    as_vllm = litellm.completion(**{**how, "model": f"hosted_vllm/{MODEL}"}, response_format=size())
    texts = {
        "parsed": content,
        "as vLLM": as_vllm.choices[0].message.content,
        "called": called.function.arguments,
        "streamed": streamed.function.arguments,
    }
    return {name: json.loads(text) for name, text in texts.items()}


def json_langchain(url: str) -> dict[str, Any]:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_tokens=200)
    kind = size()
    got = {
        method: chat.with_structured_output(kind, method=method).invoke(LION).model_dump()
        for method in ("json_schema", "function_calling")
    }
    strict = chat.with_structured_output(kind.model_json_schema(), method="json_schema", strict=True)
    (streamed,) = list(chat.with_structured_output(kind).stream(LION))[-1:]
    asked = chat.bind_tools([kind], tool_choice="any").invoke(LION)
    (call,) = asked.tool_calls
    result = ToolMessage("It is written down.", tool_call_id=call["id"])
    assert chat.invoke([HumanMessage(LION), asked, result], max_tokens=8).content
    return {**got, "strict": strict.invoke(LION), "streamed": streamed.model_dump(), "bound": call["args"]}


def json_pydantic_ai(url: str) -> dict[str, Any]:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    kind = size()

    async def streamed() -> Any:
        async with Agent(model, output_type=kind).run_stream(LION) as result:
            return await result.get_output()

    return {
        "tool": Agent(model, output_type=kind).run_sync(LION).output.model_dump(),
        "native": Agent(model, output_type=NativeOutput(kind)).run_sync(LION).output.model_dump(),
        "streamed": asyncio.run(streamed()).model_dump(),
    }


def json_agents(url: str) -> dict[str, Any]:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=url, api_key=KEY))
    noted: list[dict[str, Any]] = []

    @function_tool
    def note(height_cm: int, weight_kg: float, alive: bool) -> str:
        """Writes a size down."""
        noted.append({"height_cm": height_cm, "weight_kg": weight_kg, "alive": alive})
        return "It is written down."

    async def run() -> Any:
        parsed = await Runner.run(Agent(name="one", model=model, output_type=size()), LION)
        settings = ModelSettings(tool_choice="required", max_tokens=100)
        caller = Agent(name="two", model=model, tools=[note], model_settings=settings)
        await Runner.run(caller, LION)  # the call, then the answer behind its result
        return parsed.final_output

    parsed = asyncio.run(run())
    return {"parsed": parsed.model_dump(), "called": noted[0]}


def json_autogen(url: str) -> dict[str, Any]:
    from autogen_core.models import ModelFamily, UserMessage
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info: Any = {
        "vision": False, "function_calling": True, "json_output": True, "structured_output": True,
        "family": ModelFamily.UNKNOWN,
    }  # fmt: skip

    async def run() -> dict[str, Any]:
        client = OpenAIChatCompletionClient(model=MODEL, base_url=url, api_key=KEY, model_info=info)
        got = await client.create([UserMessage(content=LION, source="user")], json_output=size())
        return dict(json.loads(str(got.content)))

    return {"parsed": asyncio.run(run())}


def json_llm(url: str) -> dict[str, Any]:
    from llm.default_plugins.openai_models import Chat

    chat = Chat("served", model_name=MODEL, api_base=url, key=KEY, supports_schema=True)
    return {
        "whole": json.loads(chat.prompt(LION, schema=size(), stream=False).text()),
        "stream": json.loads("".join(chat.prompt(LION, schema=size()))),
    }


def json_llama_index(url: str) -> dict[str, Any]:
    from llama_index.core.prompts import PromptTemplate
    from llama_index.llms.openai_like import OpenAILike

    made: Any = {"model": MODEL, "api_base": url, "api_key": KEY, "max_tokens": 200, "is_chat_model": True}
    chat = OpenAILike(**made, is_function_calling_model=True, should_use_structured_outputs=False)
    return {"called": chat.structured_predict(size(), PromptTemplate(LION)).model_dump()}


CLIENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    name.removeprefix("ask_"): ask for name, ask in list(globals().items()) if name.startswith(("ask_", "json_"))
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
