"""Many checkpoints of one model: read one at a time, compared, kept, and shared out by rank.

- `reading`: a file as a set of weights for a captured model, or why it is refused.
- `series`: rows, each about a file, the reference and the file before.
- `kept`: the table on disk, which an interrupted run goes on with.
- `ranks`: the list shared out among processes.
- `comparison`: the result.
- `compare`: the verb.
"""
