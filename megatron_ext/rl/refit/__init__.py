"""New weights for rollouts: who needs which slice, and its way there."""
