"""The engine of our own for CPUs: the C library (src/), what loads it, and the models it runs."""
