"""Answers that tests train on."""

DOCUMENTS = (
    "A plain answer, one piece.",
    'Two:\n<promise topic="a" tokens="10"/><async>1. One.\n</async>'
    '<promise topic="b" tokens="10"/><async>2. Two.\n</async>',
    "Another plain answer that goes on.",
)
