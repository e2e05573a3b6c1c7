"""What a model learns from and is judged by: conversations about images as tokens and pixels. numpy, Pillow and SentencePiece; no torch.

suite       the procedural skill suite          jsonl, webdataset, blend   conversations and pictures from files, by `sources`
tokenizer   trains the run's vocabulary         chat, spans     the ChatML template, and where tagged sub-tasks lie in a response
stream      batches of any training step, a pure function of (seed, step)
"""
