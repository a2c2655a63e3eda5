"""Data set files in OGBench's layout: written, read, and checked against an environment.

A file is an npz with observations (N, d), actions (N, A) or (N,) integers, and terminals (N,), 1 on
the last row of each trajectory. OGBench's own files load unchanged.
"""

import os
import zipfile
import zlib

import numpy as np

from envs import Dataset


def save_dataset(path, data):
    """Write a Dataset in OGBench's npz layout; under a temporary name first, then renamed."""
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:       # several processes may write it
        try:
            np.savez_compressed(file, observations=data.observations, actions=data.actions,
                                terminals=data.terminals)
        except BaseException:                                   # a full disk, Ctrl-C
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def load_dataset(path):
    """Read a Dataset in OGBench's npz layout (other keys are ignored; nothing is unpickled).

    ValueError: the file is no such data set; OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("observations", "actions", "terminals")
                      if key in file.files}
    except (ValueError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile,
            MemoryError, RuntimeError) as e:    # RuntimeError: encrypted, or unknown compression
        raise ValueError(f"{path} is not an npz file of plain arrays ({e})") from None
    if missing := {"observations", "actions", "terminals"} - set(arrays):
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; a data set has "
                         "observations, actions, terminals")
    try:
        if any(not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub" or not x.ndim
               for x in arrays.values()):
            raise ValueError("observations, actions and terminals must be arrays of numbers")
        discrete = arrays["actions"].dtype.kind in "iu" and arrays["actions"].ndim == 1
        arrays["actions"] = arrays["actions"].astype(np.int64 if discrete else np.float32,
                                                     copy=False)
        arrays["observations"] = arrays["observations"].astype(np.float32, copy=False)
        return Dataset(**arrays)
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {e}") from None


def check_dataset(data, env):
    """ValueError unless data can have come from env.

    Point mazes: at most 1 % of the rows lie in walls, and at least 99 % of the transitions end
    where `env.move` does, up to 0.1 speed on each axis. Grids: no row lies in a wall, and every
    transition is the action's (with slip, that of any action). Of long data sets about 100,000
    transitions are checked, spread evenly.
    """
    obs, shape = data.observations, (2,) if not env.discrete else ()
    if obs.shape[1:] != (2,) or data.actions.shape[1:] != shape:
        raise ValueError(f"{env.name} has observations (N, 2) and actions (N{', 2' * len(shape)})"
                         f"; the data set has {obs.shape} and {data.actions.shape}")
    if env.discrete and (data.actions.dtype.kind not in "iu" or data.actions.min() < 0
                         or data.actions.max() > 4):
        raise ValueError(f"actions of {env.name} are integers from 0 to 4")
    free = env.is_free(obs)
    if free.mean() < (1 if env.discrete else 0.99):
        raise ValueError(f"{1 - free.mean():.0%} of the positions lie outside the free cells of "
                         f"{env.name}; the data set is of another maze")
    i = data.valid[:: max(1, len(data.valid) // 100_000)]
    i = i[free[i] & free[i + 1]]
    if not env.discrete:
        fits = np.abs(env.move(obs[i], data.actions[i]) - obs[i + 1]).max(-1) < 0.1 * env.speed
    elif env.slip:
        fits = (env.neighbours[env.number(obs[i])] == env.number(obs[i + 1])[:, None]).any(1)
    else:
        fits = env.success(env.move(obs[i], data.actions[i]), obs[i + 1])
    if fits.mean() < (1 if env.discrete else 0.99):
        step = "the move of an action" if env.discrete else f"{env.speed} x action, up to walls"
        raise ValueError(f"{1 - fits.mean():.0%} of the steps are not {step}, as in {env.name}; "
                         "the data set is of another environment")
