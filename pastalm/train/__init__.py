"""The finetuning that teaches a model to annotate itself."""
