"""What X-SAM writes beside a model: its state in checkpoints, its settings and card on the hub."""
