"""What the clips are: files and their labels, and who may be tested on whom.

    folder, bucket or table ──manifest──> one row a file ──protocols──> train, validation, test rows

`names` reads RAVDESS file names; `manifest` lists RAVDESS in any layout, or a corpus of one's own;
`census` compares it with what RAVDESS should hold; `splits` names the folds; `synthetic` makes a
small corpus with the same names, and `download` fetches the real one. Only `names` is imported with
the package: it needs nothing but Python.
"""

from ser_ray.corpus.ravdess import EMOTIONS, ClipName, NameProblem, format_name, parse_name

__all__ = ["EMOTIONS", "ClipName", "NameProblem", "format_name", "parse_name"]
