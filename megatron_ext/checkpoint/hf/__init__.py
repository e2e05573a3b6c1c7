"""Hugging Face checkpoints in and out.

config.json                  -> configuration.py -> ModelConfig
*.safetensors, index         -> source.py        -> names, shapes, one tensor at a time
names and transforms         -> names.py         -> one table for both directions
to_megatron.py, from_megatron.py                 -> streaming conversion, published whole or not at all
"""
