"""A server that answers OpenAI's API with one model, and the page to talk to it."""
