"""What the core itself contributes, through the same contract as any plugin."""
