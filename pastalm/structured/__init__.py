"""Structured output: JSON whose fields are threads. The schema makes the promises, so any model can do it."""
