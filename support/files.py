"""Files of a run: text, JSON, CSV, and trees of arrays as npz.

Every file is written under a temporary name and then renamed, so that other processes see the old
file or the new one, never a part of it. Nothing is unpickled. OSError is passed on.
"""

from nets import flatten, unflatten     # first: nets sets one BLAS thread before numpy loads

import csv
import io
import json
import os
import zipfile
import zlib

import numpy as np


def write_text(path, text):
    """Write text without translating line ends."""
    with open(f"{path}.tmp", "w", newline="") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def write_json(path, value):
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The value in a JSON file; ValueError if it is not JSON."""
    with open(path) as file:
        try:
            return json.load(file)
        except ValueError as e:
            raise ValueError(f"{path} is not JSON ({e})") from None


def write_rows(path, rows):
    """Write dicts as CSV; the columns are the keys in order of first appearance.

    Floats have six significant digits; None and missing keys are empty cells; lists are joined by
    spaces, with nan for None.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [columns] + [[_cell(row.get(key, "")) for key in columns] for row in rows])
    write_text(path, buffer.getvalue())


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(x) or "nan" for x in value)
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def read_rows(path):
    """The rows of a CSV file as dicts of strings; empty cells are ""."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def save_tree(path, tree):
    """Write a nested dict of arrays as npz, under the names of `nets.flatten`."""
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, **flatten(tree))
    os.replace(f"{path}.tmp", path)


def load_tree(path):
    """Read what `save_tree` wrote; ValueError if it is no npz file of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return unflatten({name: file[name] for name in file.files})
    except (ValueError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile,
            MemoryError, RuntimeError) as e:            # the latter: encrypted, unknown compression
        raise ValueError(f"{path} is not an npz file of plain arrays ({e})") from None
