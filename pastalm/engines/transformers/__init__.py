"""The reference engine: models of transformers, on CPU and GPU."""
