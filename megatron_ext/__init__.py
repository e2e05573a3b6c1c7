"""megatron-ext: training of mixture-of-experts vision-language models that look again (CLVR) and reason through the right experts (EARL)."""

__version__ = "0.1.0"
