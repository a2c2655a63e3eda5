"""Data sets: files in OGBench's layout, data of no environment, and a check against a maze.

A file is an npz with observations (N, d), actions (N, A) or (N,) integers, and terminals (N,), 1 on
the last row of each trajectory. OGBench's own files load unchanged.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os

import numpy as np

from envs import Dataset
from support.runs import load_arrays

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


class DataAlone:
    """Stands in for an environment: what the data alone tell.

    discrete: whether actions are integers; action_dim: their entries, or how many integers there
    are; centre, scale (d,): what `encode` subtracts from each entry of a state, its mean, and then
    multiplies by, so that the root mean square of its change in k steps (fewer at a trajectory's
    end) is 3; 1 for an entry that never changes. On the data of point-medium, whose cells have side
    4, it is about 3: side is that of encoded states [D19]. goal_indices: the entries of a state
    that make a goal; none: all. units: all of this as arrays, to be kept.
    """

    name = "none"
    tasks = ()
    side = 4.0
    extra = 0                               # entries of `pair` beyond those of s and g

    def __init__(self, data, k, goal_indices=(), name="the data set"):
        """ValueError, which begins with the name: actions that are neither in [-1, 1] nor integers
        from 0; goal_indices beyond a state's entries."""
        actions, states = data.actions, data.observations.astype(float)
        discrete = actions.dtype.kind in "iu"
        low, high = (0, 999) if discrete else (-1, 1)
        if actions.ndim != 2 - discrete or actions.min() < low or actions.max() > high:
            raise ValueError(f"{name}: actions must be (N, a) numbers in [-1, 1] or (N,) integers "
                             f"from 0 to 999; here they are {actions.dtype} of shape "
                             f"{actions.shape} from {actions.min()} to {actions.max()}")
        if max(goal_indices, default=0) >= states.shape[1]:
            raise ValueError(f"{name}: --goal-indices {','.join(map(str, goal_indices))} go beyond "
                             f"the {states.shape[1]} entries of an observation")
        later = np.minimum(data.valid + k, data.last[data.valid])
        change = np.sqrt(((states[later] - states[data.valid]) ** 2).mean(0))
        self.goal_indices = list(goal_indices)
        self.units = {"centre": states.mean(0), "scale": 3 / np.where(change > 0, change, 3),
                      "discrete": np.array(discrete),
                      "action_dim": np.array(actions.max() + 1 if discrete else actions.shape[1])}

    @classmethod
    def restored(cls, units, goal_indices):
        """One to act with, from the units of an earlier one."""
        env = cls.__new__(cls)
        env.units, env.goal_indices = units, list(goal_indices)
        return env

    @property
    def discrete(self):
        return bool(self.units["discrete"])

    @property
    def action_dim(self):
        return int(self.units["action_dim"])

    def encode(self, s, dtype=np.float32):
        """States (..., d) as the networks see them. ValueError: another number of entries."""
        return self._standardised("states and goals", s, slice(None)).astype(dtype)

    def encode_goal(self, g, dtype=np.float32):
        """Goals (..., G) as the networks see them: states, or their entries goal_indices."""
        if not self.goal_indices:
            return self.encode(g, dtype)
        return self._standardised("goals", g, self.goal_indices).astype(dtype)

    def pair(self, s, g):
        """Encoded states s (..., d) and goals g (..., G), one input: (..., d + G)."""
        return np.concatenate([s, g], -1)

    def _standardised(self, what, x, entries):
        x = np.asarray(x, float)
        centre, scale = self.units["centre"][entries], self.units["scale"][entries]
        if x.shape[-1:] != centre.shape:
            raise ValueError(f"{what} must have {len(centre)} entries, as in the data; here their "
                             f"shape is {x.shape}")
        return (x - centre) * scale


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
