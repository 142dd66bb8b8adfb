"""A web page and OpenAI's API over one model."""
