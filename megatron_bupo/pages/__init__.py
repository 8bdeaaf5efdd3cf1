"""Pages for people: one HTML file with all that it needs inside, no network, no scripts but its
own.

A template beside whoever fills it holds the page; `style.css` and `draw.js`, the look and the
pencil of all of them, come in here, and so does the data, which the page's own script draws.
"""
