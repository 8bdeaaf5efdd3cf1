"""What runs inside SGLang's own processes: nothing of ours, and nothing that ours needs.

This folder goes on the servers' PYTHONPATH, so what lies in it is imported by its own name there.
"""
