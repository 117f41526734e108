"""The language, and how an answer in it is decoded: no torch, no files, no network."""
