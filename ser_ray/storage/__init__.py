"""Paths and URIs, whole files, one writer for a folder."""
