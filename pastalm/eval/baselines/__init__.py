"""The methods that came before, each a `System` on the same model, or an annotator that makes its training data."""
