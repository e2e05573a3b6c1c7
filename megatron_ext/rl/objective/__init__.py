"""GRPO and its relatives: pure functions from rewards to advantages to the loss."""
