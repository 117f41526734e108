"""What holds on a CPU holds on a GPU: packed decoding through CUDA graphs, and the loss of training."""

from __future__ import annotations

import pytest
import torch

from pastalm.core.driver import Driver
from pastalm.core.interpreter import Limits
from pastalm.core.language import Text
from pastalm.core.params import SamplingParams
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.records.documents import parse
from pastalm.records.transcripts import linear_tokens
from pastalm.train.dataset import collate
from pastalm.train.loss import log_probs
from pastalm.train.packing import pack
from tests.laws.test_exactness import worst
from tests.laws.tiny import ARCHITECTURES, EOS, tiny_model, tiny_vocabulary

DOCUMENT = """Two tips.
<promise topic="sleep" tokens="20"/><async>1. Sleep eight hours.
</async><promise topic="food" tokens="30"/><async>2. Eat what you like.
</async><sync/>Both take practice."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_many_responses(name: str, graphs: bool) -> None:
    """In float64: each token of each thread as one masked forward on the CPU has it."""
    model = tiny_model(name)
    engine = TransformersEngine(tiny_model(name), max_num_seqs=3, max_model_len=256, device="cuda", graphs=graphs)
    assert worst(engine, model, overlapping=2) < 1e-6  # norms and softmax are in float32


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_answers(temperature: float) -> None:
    """Graphs, eager steps and the CPU write the same tokens, and a graph is captured once a shape."""
    params = SamplingParams(temperature=temperature, max_tokens=80, seed=3)
    found = []
    for device, graphs in (("cpu", False), ("cuda", False), ("cuda", True)):
        engine = TransformersEngine(
            tiny_model("llama"), max_num_seqs=4, max_model_len=256, device=device, graphs=graphs
        )
        driver = Driver(engine, tiny_vocabulary(), limits=Limits())
        running = [driver.submit(range(20, 40 + i), params, seed=i) for i in range(6)]
        while driver.running:
            driver.step()
        found.append([tuple(linear_tokens(r.transcript)) for r in running])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_the_loss_of_training(attention: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    documents = [parse(DOCUMENT), (Text("short"),)]
    inputs = collate([pack(range(20, 60), one, tiny_vocabulary(), "promised", eos=EOS) for one in documents])
    expected = log_probs(model, inputs)
    model.cuda()
    model.set_attn_implementation(attention)
    found = log_probs(model, {name: x.cuda() for name, x in inputs.items()})
    assert torch.allclose(found.cpu(), expected, atol=1e-3), (found, expected)
