"""Logits processors: what changes the logits of a thread before its token is chosen.

Each request has a chain of them: `logit_bias`, the repetition penalty, then those of `SamplingParams.processors` in
their order. Each thread has its own chain: a child's is made from its parent's where it forks. A chain runs right
before a token is sampled, on the raw logits, with what the thread sees at that moment; `allowed`, temperature, top-k,
top-p and min-p come behind it, and log-probabilities stay those of the model. Guesses that are fed ahead (`drafts/`)
are no exception: their logits are processed only when their thread samples from them, so drafts change nothing.

`base.py` has the protocol, `chain.py` makes the chain of a request, `docs/processors.md` says how to write one.
"""
