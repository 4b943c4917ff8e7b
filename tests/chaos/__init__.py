"""A run on two hosts that is hit again and again: `make chaos`.

cluster   two hosts of two ranks, a web server with the shards, a tracking server
entry     train/main.py, with a model that breaks once when it is told to
faults    what can go wrong, and how to bring it about
verdict   whether the run that was hit is the run that was not
"""
