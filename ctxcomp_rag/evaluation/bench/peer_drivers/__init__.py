"""Another project reading the workload, in an interpreter of its own: `PYTHON -m peer_drivers NAME`.

Runs by itself: it imports nothing of ours, because the peer's environment has other versions. One line of JSON in (the
workload and the decoder's configuration), one line out when it is ready, `{"versions": ..., "rows": [...]}` or
`{"skip": reason}`; then for each line in, `{"row": name}`, one answer is timed and one line comes out. Weights are
random, of the given shape, in float32, and so are the caches; one thread.
"""
