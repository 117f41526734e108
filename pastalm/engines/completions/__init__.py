"""An engine over a server of OpenAI's completions API."""
