"""Negotiator: teaches a language model to negotiate by self-play and GRPO."""

__version__ = "0.1.0"
