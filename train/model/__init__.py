"""The speech LLM: a frozen speech encoder, a trained adapter, a frozen text LLM."""
