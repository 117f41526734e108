"""PASTA: asynchronous decoding of language models."""
