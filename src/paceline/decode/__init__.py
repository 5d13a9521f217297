"""What is decided about tokens: pure functions over logits, knowing nothing of models, text or requests."""
