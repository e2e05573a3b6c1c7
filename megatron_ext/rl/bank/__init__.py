"""The durable bank: every rollout is on disk before it counts, and a ledger says what each step trained on. Start at `bank.py`."""
