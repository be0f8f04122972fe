"""Using models: pictures from base, aligned and LoRA checkpoints."""
