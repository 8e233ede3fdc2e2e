"""Base models: their configuration, their RoPE, and the one decoder that covers all families."""
