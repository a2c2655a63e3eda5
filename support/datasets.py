"""Data sets: files in OGBench's layout, data of no environment, and a check against a maze.

A file is an npz with observations (N, d), actions (N, A) or (N,) integers, and terminals (N,), 1 on
the last row of each trajectory. OGBench's own files load unchanged, and D4RL's, whose timeouts (or
truncations) end trajectories too.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import numpy as np

from envs import Dataset
from support.runs import load_arrays, write

NEEDED = "observations", "actions", "terminals"
ENDS = "timeouts", "truncations"        # D4RL's and Gymnasium's name of ends that are no terminals


def save_dataset(path, data, **entries):
    """Write a Dataset in OGBench's npz layout, with further entries."""
    arrays = {name: getattr(data, name) for name in NEEDED}
    write(path, lambda file: np.savez_compressed(file, **arrays, **entries))


def load_dataset(path):
    """Read a Dataset in OGBench's npz layout; nothing is unpickled.

    timeouts or truncations end trajectories as terminals do, and so does the last row of a file
    that has them; see `_ends` for terminals that are flags of a task. Trajectories of one row are
    left out then: D4RL's maze2d has some. next_observations must be the rows that follow. Other
    keys, such as rewards, are of no use here.
    ValueError: the file is no such data set; OSError: it cannot be read.
    """
    arrays = load_arrays(path, {*NEEDED, *ENDS, "next_observations"})
    if missing := set(NEEDED) - arrays.keys():
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; a data set has "
                         "observations, actions, terminals")
    for name, x in arrays.items():
        if x.dtype.kind not in "fiub" or not x.ndim:
            raise ValueError(f"{path}: {name} must be an array of numbers; here it is {x.dtype} of "
                             f"shape {x.shape}")
    try:
        for name in ENDS:
            if name in arrays:
                ends = arrays["terminals"] = _ends(arrays["terminals"], arrays[name])
                alone = ends & np.append(True, ends[:-1])       # of one row: it has no transition
                arrays = {key: x[~alone] for key, x in arrays.items()}
        data = Dataset(*(arrays[name] for name in NEEDED))
        if "next_observations" in arrays:
            _check_next(data, arrays["next_observations"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return data


def _ends(terminals, timeouts):
    """Whether a row ends its trajectory (N,): one of both flags is true, or it is the last row.

    Where terminals follow one another they are flags of a task, as in D4RL's AntMaze, true for as
    long as the agent is near the goal: then timeouts alone count."""
    if terminals.size != timeouts.size or timeouts.size < 2:
        raise ValueError(f"terminals {terminals.shape} and timeouts {timeouts.shape} do not fit "
                         "together")
    terminals, timeouts = terminals.ravel() > 0, timeouts.ravel() > 0
    if (terminals[1:] & terminals[:-1]).any():
        terminals = np.zeros_like(terminals)
    ends = terminals | timeouts
    if not ends.any():
        raise ValueError("neither terminals nor timeouts end a trajectory")
    ends[-1] = True
    return ends


def _check_next(data, following):
    """ValueError unless next_observations (N, d) are the rows that follow in a trajectory."""
    i = data.valid
    if following.shape != data.observations.shape:
        raise ValueError(f"next_observations have the shape {following.shape} and not that of "
                         f"observations, {data.observations.shape}")
    other = ~np.isclose(following[i], data.observations[i + 1], rtol=1e-5, atol=1e-5).all(1)
    if other.any():
        raise ValueError(f"after {other.sum():,} rows, such as {i[other.argmax()]}, another row "
                         "follows than next_observations say: rows must be in the order of time, "
                         "and each trajectory's last one be marked")


def jumps(data):
    """How many transitions are far beyond the usual one: over ten times the 90 % quantile of their
    lengths, in each entry's standard deviations. Unmarked ends of trajectories look like that."""
    x = data.observations.astype(float)
    change = (x[data.valid + 1] - x[data.valid]) / np.maximum(x.std(0), 1e-300)
    length = np.sqrt((change ** 2).sum(1))
    usual = np.quantile(length, 0.9)
    return int((length > 10 * usual).sum()) if usual else 0


class DataAlone:
    """Stands in for an environment: what the data alone tell.

    discrete: whether actions are integers; action_dim: their entries, or how many integers there
    are; centre, scale (d,): what `encode` subtracts from each entry of a state, its mean, and then
    multiplies by (`scales`). goal_indices: the entries of a state that make a goal; none: all.
    units: all of this as arrays, to be kept. still: the entries that hardly move.
    """

    name = "none"
    tasks = ()
    side = 4.0
    extra = 0                               # entries of `pair` beyond those of s and g

    def __init__(self, data, k, goal_indices=(), name="the data set"):
        """ValueError, which begins with the name: goal_indices beyond a state's entries."""
        actions, states = data.actions, data.observations.astype(float)
        discrete = actions.dtype.kind == "i"
        if max(goal_indices, default=0) >= states.shape[1]:
            raise ValueError(f"{name}: --goal-indices {','.join(map(str, goal_indices))} go beyond "
                             f"the {states.shape[1]} entries of an observation")
        self.goal_indices = list(goal_indices)
        scale, self.still = scales(data, k)
        self.units = {"centre": states.mean(0), "scale": scale, "discrete": np.array(discrete),
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


def scales(data, k):
    """Factors (d,) on the entries of states, and the numbers of those that hardly move.

    An entry's change in k steps (fewer at a trajectory's end) gets the root mean square 3. On the
    data of point-medium, whose cells have side 4, it is about that without a factor [D19]. Where it
    is below a hundredth of the entry's spread (standard deviation), the spread is set to 3 instead.
    An entry hardly moves if its spread is below what a float32 resolves of it, or below 1e-7 of the
    largest spread: its factor is 1, so that noise stays as small as it is.
    """
    states = data.observations.astype(float)
    later = np.minimum(data.valid + k, data.last[data.valid])
    change = np.sqrt(((states[later] - states[data.valid]) ** 2).mean(0))
    spread = states.std(0)
    resolution = np.finfo(np.float32).eps * np.abs(states).max(0)
    still = spread <= np.maximum(resolution, 1e-7 * spread.max())
    unit = np.where(change > 0.01 * spread, change, spread)
    return 3 / np.where(still, 3, unit), np.flatnonzero(still).tolist()


def check_dataset(data, env, name="the data set"):
    """ValueError, which begins with the name, unless data can have come from env.

    No row lies beyond the outer walls. Point mazes: at most 1 % of the rows lie in walls, and at
    least 99 % of the transitions end where `env.move` does, up to 0.1 speed on each axis. Grids: no
    row lies in a wall, and every transition is the action's (with slip, that of any action). Of
    long data sets about 100,000 transitions are checked, spread evenly.
    """
    obs, actions, shape = data.observations, data.actions, (2,) if not env.discrete else ()
    if obs.shape[1:] != (2,) or actions.shape[1:] != shape:
        raise ValueError(f"{name}: {env.name} has observations (N, 2) and actions (N"
                         f"{', 2' * len(shape)}); here they are {obs.shape} and {actions.shape}")
    if env.discrete and actions.max() > 4:
        raise ValueError(f"{name}: actions of {env.name} are integers from 0 to 4; here they reach "
                         f"{actions.max()}")
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
