"""Training a drafter for a target: what the target does is captured, then distilled (`paceline train`)."""
