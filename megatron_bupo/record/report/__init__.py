"""Runs side by side: what they are, what they came to, and every number that they wrote, as one
page and as figures. `runs.py` reads run directories, `curves.py` makes lines of them, `charts.py`
says which lines stand together, `facts.py` puts what they are and came to into tables; `page.py`
and `figures.py` show all of it.
"""
