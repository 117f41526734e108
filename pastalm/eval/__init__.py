"""Measuring what asynchronous decoding gains and costs."""
