"""Does a recipe fit, and how long does a step take? Arithmetic on sizes and stated rates; no torch,
no files but config.json's, and an answer in a fraction of a second.
"""
