"""Models: downloading, preparing, loading, adapters, chat templates, packed models, GGUF files."""
