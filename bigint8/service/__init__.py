"""The HTTP service: OpenAI's interface over a loaded model."""
