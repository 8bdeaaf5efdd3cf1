"""How good is the full policy? Sampled answers, graded."""
