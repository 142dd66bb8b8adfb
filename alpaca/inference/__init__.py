"""From a prompt to an answer: the engine, sampling, generating, the watermark."""
