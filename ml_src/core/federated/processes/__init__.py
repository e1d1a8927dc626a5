"""A federation of real machines: Flower's SuperLink and SuperNodes as children of our commands, with our own workers.

Next to read: `server.py` and `site.py`, one a command; `runtime.py`, all that is used of Flower's inside.
"""
