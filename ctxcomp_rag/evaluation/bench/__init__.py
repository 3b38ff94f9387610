"""Time and memory of every way to read the same chunks, side by side in one run (`ctxcomp bench`)."""
