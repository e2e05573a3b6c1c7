"""What a model learns from and is judged by: conversations about images as tokens and pixels. numpy, Pillow and SentencePiece; no torch.

suite       the procedural skill suite          jsonl, images   conversations and pictures from files
tokenizer   trains the run's vocabulary         chat, spans     the ChatML template, and where tagged sub-tasks lie in a response
stream      batches of any training step, a pure function of (seed, step)
"""
