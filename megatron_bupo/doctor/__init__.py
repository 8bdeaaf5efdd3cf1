"""What is amiss on this machine, before a run finds out: findings, each with the way out."""
