"""Several data holders train one model, and their images stay where they are; the only importer of Flower.

Next to read: `rounds.py`, the server's side; `site.py`, a site's side; `simulation.py`, all of them in one process.
"""
