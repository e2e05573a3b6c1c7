"""Small real models and batches that several tests share."""
