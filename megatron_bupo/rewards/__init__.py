"""Responses to rewards.

`functions`, `math_answers` and `worker` do without torch: the grading process must start quickly.
"""
