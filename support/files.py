"""Files of a run: text, JSON, CSV, and trees of arrays as npz.

Every file is written under a temporary name and then renamed, so that other processes see the old
file or the new one, never a part of it. Nothing is unpickled. Whatever is wrong with the content of
a file that is read is a ValueError that names the file; OSError is passed on.
"""

from nets import flatten, unflatten     # first: nets sets one BLAS thread before numpy loads

import contextlib
import csv
import io
import json
import os
import warnings
import zipfile

import numpy as np


@contextlib.contextmanager
def replacing(path):
    """The temporary name under which a file is written; at the end it is renamed to path.

    If that fails, nothing temporary is left, and an OSError names the path."""
    try:
        yield f"{path}.tmp"
        os.replace(f"{path}.tmp", path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        if isinstance(e, OSError):
            raise OSError(f"{path}: {e.strerror or e}") from None
        raise


def write_text(path, text):
    """Write text without translating line ends."""
    with replacing(path) as name, open(name, "w", newline="") as file:
        file.write(text)


def write_json(path, value):
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _open(path, mode="r", **more):
    """`open` for reading; ValueError for what is no regular file: a pipe would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")
    return open(path, mode, **more)


def read_json(path):
    """The value in a JSON file."""
    with _open(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not JSON ({e})") from None


def write_rows(path, rows):
    """Write dicts as CSV; the columns are the keys in order of first appearance.

    Floats have six significant digits; None and missing keys are empty cells; lists are joined by
    spaces, with nan for None.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [columns] + [[cell(row.get(key, "")) for key in columns] for row in rows])
    write_text(path, buffer.getvalue())


def cell(value):
    """The text of a value in a CSV file, see `write_rows`."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(cell(x) or "nan" for x in value)
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def read_rows(path):
    """The rows of a CSV file as dicts of strings; empty cells are ""."""
    with _open(path, newline="") as file:
        try:
            rows = list(csv.DictReader(file, strict=True))
        except (ValueError, csv.Error) as e:            # no text, a quote without end
            raise ValueError(f"{path} is not CSV ({e})") from None
    for i, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {i} of {path} has more or fewer cells than the first line")
    return rows


def read_log(path, counter):
    """The rows of a run's train.csv or eval.csv, as `read_rows` gives them.

    ValueError also: no rows; cells that are no numbers; counters, integers in the column of that
    name, that do not rise.
    """
    rows = read_rows(path)
    try:
        counts = [0] + [int(row[counter]) for row in rows]
        [float(x) for row in rows for cell in row.values() for x in cell.split()]
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path} needs a column {counter!r} of integers, and numbers alone "
                         f"({e})") from None
    if not rows or counts != sorted(set(counts)):
        raise ValueError(f"{path} needs rows in which {counter!r} rises")
    return rows


def save_tree(path, tree):
    """Write a nested dict of arrays as npz, under the names of `nets.flatten`."""
    with replacing(path) as name, open(name, "wb") as file:
        np.savez(file, **flatten(tree))


def load_tree(path):
    """Read what `save_tree` wrote."""
    arrays = load_arrays(path)
    if any(name.startswith(f"{other}/") for name in arrays for other in arrays):
        raise ValueError(f"{path} has an array and a folder of the same name")
    return unflatten(arrays)


def load_arrays(path, wanted=None):
    """{name: array} of an npz file: all its arrays, or those of `wanted` that it has."""
    with _open(path, "rb") as file:
        try:                            # damaged files raise about fifteen kinds of exceptions
            with zipfile.ZipFile(file) as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")         # of headers that are odd or damaged
                names = [entry.removesuffix(".npy") for entry in archive.namelist()]
                return {name: _load_array(archive, f"{name}.npy") for name in names
                        if wanted is None or name in wanted}
        except Exception as e:
            raise ValueError(f"{path} is not an npz file of plain arrays ({e})") from None


def _load_array(archive, entry):
    """An array of an open npz file. Memory is taken as the bytes of the file are read, not as the
    array's header claims."""
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its arrays are not in version 1.0 of numpy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        return np.ndarray(shape, dtype, file.read(), order="F" if fortran else "C").copy()
