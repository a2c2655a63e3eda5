"""Data set files in OGBench's layout: written, read, and checked against an environment.

A file is an npz with observations (N, d), actions (N, A) or (N,) integers, and terminals (N,), 1 on
the last row of each trajectory. OGBench's own files load unchanged.
"""

import os

import numpy as np

from envs import Dataset
from support.files import load_arrays

KINDS = {"observations": "fiu", "actions": "fiu", "terminals": "fiub"}      # numpy's letters


def save_dataset(path, data, **entries):
    """Write a Dataset in OGBench's npz layout, with further entries; under a temporary name first,
    then renamed."""
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:       # several processes may write it
        try:
            np.savez_compressed(file, observations=data.observations, actions=data.actions,
                                terminals=data.terminals, **entries)
        except BaseException:                                   # a full disk, Ctrl-C
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def load_dataset(path):
    """Read a Dataset in OGBench's npz layout (other keys are ignored; nothing is unpickled).

    ValueError: the file is no such data set; OSError: it cannot be read.
    """
    arrays = load_arrays(path, KINDS)
    if missing := KINDS.keys() - arrays:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; a data set has "
                         "observations, actions, terminals")
    for name, x in arrays.items():
        if x.dtype.kind not in KINDS[name] or not x.ndim:
            raise ValueError(f"{path}: observations, actions and terminals must be arrays of "
                             f"numbers; {name} is {x.dtype} of shape {x.shape}")
    discrete = arrays["actions"].dtype.kind in "iu" and arrays["actions"].ndim == 1
    with np.errstate(all="ignore"):                     # what overflows is infinite: refused below
        arrays["actions"] = arrays["actions"].astype(np.int64 if discrete else np.float32)
        arrays["observations"] = arrays["observations"].astype(np.float32)
    try:
        return Dataset(**arrays)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def check_dataset(data, env, name="the data set"):
    """ValueError, which begins with the name, unless data can have come from env.

    No row lies beyond the outer walls. Point mazes: actions lie in [-1, 1], at most 1 % of the
    rows lie in walls, and at least 99 % of the transitions end where `env.move` does, up to 0.1
    speed on each axis. Grids: no row lies in a wall, and every transition is the action's (with
    slip, that of any action). Of long data sets about 100,000 transitions are checked, spread
    evenly.
    """
    obs, actions, shape = data.observations, data.actions, (2,) if not env.discrete else ()
    if obs.shape[1:] != (2,) or actions.shape[1:] != shape:
        raise ValueError(f"{name}: {env.name} has observations (N, 2) and actions (N"
                         f"{', 2' * len(shape)}); here they are {obs.shape} and {actions.shape}")
    low, high = (0, 4) if env.discrete else (-1, 1)
    if (env.discrete and actions.dtype.kind not in "iu") or actions.min() < low or (
            actions.max() > high):
        raise ValueError(f"{name}: actions of {env.name} are "
                         f"{'integers' if env.discrete else 'numbers'} from {low} to {high}; here "
                         f"they are {actions.dtype} from {actions.min()} to {actions.max()}")
    corners = env.place(np.array([(0, 0), np.array(env.walls.shape) - 1]))
    beyond = ((obs < corners.min(0)) | (obs > corners.max(0))).any(-1)
    if beyond.any():
        row = beyond.argmax()
        raise ValueError(f"{name}: the position in row {row}, {obs[row].tolist()}, lies beyond the "
                         f"outer walls of {env.name}")
    free, share = env.is_free(obs), 1 if env.discrete else 0.99
    if free.mean() < share:
        raise ValueError(f"{name} is of another maze: {(~free).sum():,} of {len(obs):,} positions "
                         f"lie outside the free cells of {env.name}")
    i = data.valid[:: max(1, len(data.valid) // 100_000)]
    i = i[free[i] & free[i + 1]]
    if not env.discrete:
        fits = np.abs(env.move(obs[i], actions[i]) - obs[i + 1]).max(-1) < 0.1 * env.speed
    elif env.slip:
        fits = (env.neighbours[env.number(obs[i])] == env.number(obs[i + 1])[:, None]).any(1)
    else:
        fits = env.success(env.move(obs[i], actions[i]), obs[i + 1])
    if fits.mean() < share:
        step = "the move of an action" if env.discrete else f"{env.speed} x action, up to walls"
        raise ValueError(f"{name} is of another environment: {(~fits).sum():,} of {len(i):,} steps "
                         f"are not {step}, as in {env.name}")
