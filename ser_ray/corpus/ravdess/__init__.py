"""RAVDESS: what is particular to this corpus.

names      the labels in its file names
census     compares the listed files with the complete corpus
download   gets the corpus from Zenodo: `fetch` downloads archives, `unpack` extracts them
"""
