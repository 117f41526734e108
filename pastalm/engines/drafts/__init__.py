"""Lossless drafts: tokens that are fed before their thread has sampled them, where a forward pass has rows to spare.

A drafter guesses the next tokens of a thread; the engine feeds them behind the thread's own next token, in places that
nobody sees. Where the thread then samples what was guessed, the logits behind it are there already and its next token
needs no forward pass; where it samples something else, the guesses are dropped. Noise depends on seed, choice, path and
index alone, so the tokens are the same with and without drafts, greedy or not (speculative decoding: Leviathan et al.,
arXiv 2211.17192, with a deterministic drafter and the noise fixed beforehand).

Left out: Jacobi iteration (lookahead decoding, arXiv 2402.02057), whose n-grams from rows behind wrong guesses saved
1 % of the passes for 6 % more rows (docs/drafts.md).
"""
