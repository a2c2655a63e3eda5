"""Exact values on gridworlds: what HIQL's value loss converges to, counted and solved.

On a grid the loss can be minimised without a network. Count how often each (state, next state,
goal) is drawn (`goal_counts`), then solve for the expectile of each (state, goal)
(`expectile_values`). lab/test_exact.py compares a learned value with that fixed point.

    python -m lab.exact [FOLDER]    the exact values of the four rooms, drawn into FOLDER (default
                                    runs) as exact_values.png and chance.png; 5 seconds. Prints
                                    the mean distance between two of them.

n is the number of free cells; env is an `envs.GridWorld`. Values are arrays V[s, g] (n, n) in
discounted steps (-1 a step, 0 at the goal), with cells numbered as in `Maze.cells`.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os

import numpy as np

import envs
from support import plots
from support.flags import Parser
from support.runs import one_line_errors

# ------------------------------------------------------------------------------ exact values


def optimal_value(steps, discount):
    """V* of goals so many steps away, an array or a number: -1 a step, 0 at the absorbing goal."""
    return -(1 - discount ** np.asarray(steps, float)) / (1 - discount)


def goal_counts(env, data, discount, p_curgoal, p_trajgoal):
    """The joint distribution of (s, s', g, goal reached) that `hiql.sample` draws, counted.

    A row i with a transition is drawn uniformly. Its goal is row i itself with probability
    p_curgoal, row min(i + Geometric(1 - discount), last transition of the trajectory) with
    p_trajgoal, and otherwise any row with a transition. The goal is reached if it is row i.
    -> at_goal (n, n): probability of (s, g) with the goal reached; go_on (n, 5, n): of
    (s, move, g) with the goal not reached, where s' is env.neighbours[s, move]. Together they sum
    to 1. ValueError if a transition of the data is no move of the grid.
    """
    n, valid = len(env.cells), data.valid
    p_randomgoal = 1 - p_curgoal - p_trajgoal
    cell = env.number(data.observations)
    moved = env.neighbours[cell[valid]] == cell[valid + 1, None]
    if not moved.any(-1).all():
        raise ValueError("the data set has steps that are no move of the grid")
    s, move, last_transition = cell[valid], moved.argmax(-1), data.last[valid] - 1
    frequency = np.bincount(s, minlength=n) / len(valid)

    # the row itself: chosen, at a trajectory's end, or by chance
    weight = p_curgoal + p_trajgoal * (valid == last_transition) + p_randomgoal / len(valid)
    at_goal = np.diag(np.bincount(s, weight, minlength=n))
    # any row, by chance, but for the row itself
    go_on = np.zeros((n, 5, n))
    np.add.at(go_on, (s, move), p_randomgoal * frequency)
    np.add.at(go_on, (s, move, s), -p_randomgoal / len(valid))
    # rows ahead; the last one takes the whole tail of the draws
    for ahead in range(1, data.lengths.max() - 1):
        rows = np.flatnonzero(valid + ahead <= last_transition)
        ends = valid[rows] + ahead == last_transition[rows]
        weight = p_trajgoal * discount ** (ahead - 1) * np.where(ends, 1, 1 - discount)
        np.add.at(go_on, (s[rows], move[rows], cell[valid[rows] + ahead]), weight)
    return at_goal / len(valid), go_on / len(valid)


def expectile_values(env, at_goal, go_on, discount, expectile):
    """The fixed point V (n, n) of HIQL's value loss, from `goal_counts`.

    V(s,g) is the expectile of y = 0 where the goal is reached and y = -1 + discount V(s',g)
    elsewhere: the root of sum_y p(y) |expectile - 1(y < V)| (y - V) = 0. It is iterated until no
    value changes by 1e-12. Pairs (s, g) that the loss never draws are NaN.
    """
    seen = at_goal + go_on.sum(1) > 1e-15
    at_goal, v = np.where(seen, at_goal, 1), np.zeros(at_goal.shape)    # 0 for pairs never drawn
    while True:
        new = _expectile(-1 + discount * v[env.neighbours], v, go_on, expectile, at_goal)
        change, v = np.abs(new - v).max(), new
        if change < 1e-12:
            return np.where(seen, v, np.nan)


def _expectile(y, v, p, expectile, p_zero=0):
    """Expectiles (n, n), over the second axis, of y (n, m, n) with weights p, like y or a number.

    The value 0 is added with weight p_zero (n, n). Newton's method from v (n, n): it is exact once
    no y changes to the other side of v. It runs to its end, because a single Newton step in each
    sweep of value iteration would not be a contraction and might cycle.
    """
    for _ in range(50):
        weight = p * np.where(y >= v[:, None], expectile, 1 - expectile)
        new = (weight * y).sum(1) / (weight.sum(1) + expectile * p_zero)
        change, v = np.abs(new - v).max(), new
        if change < 1e-13:
            break
    return v


def behaviour_counts(go_on):
    """The go_on (n, 5, n) of `goal_counts` with s' made independent of g given s.

    p(s), p(g | s) and p(s' | s) stay the same. The fixed point is then the expectile value of the
    policy that collected the data. Hindsight goals lie where a trajectory went, so that given g the
    recorded s' is better than that policy's average step.
    """
    pair, move = go_on.sum(1, keepdims=True), go_on.sum(2, keepdims=True)
    return pair * move / np.maximum(move.sum(1, keepdims=True), 1e-300)


def values_under_chance(env, discount, expectile):
    """Four exact values (n, n) on a slippery grid: from Q-learning's to HIQL's.

    The data are of uniform actions; goals absorb. Q(s,a,g) = E[-1 + discount V(s',g)] over slips.
    -> a dict
       optimal          V = max_a Q (Q-learning): it asks for actions that the data may not show
       one expectile    Q = the expectile of -1 + discount Q(s',a',g) over slips and the data's next
                        action a', V = that of Q over a: a lucky slip counts like a good action
       over actions     V = the expectile of Q over a (IQL): chance is averaged out first
       action-free      V = the expectile of -1 + discount V(s',g) over s' (HIQL): luck counts again
    """
    n, goal = len(env.cells), np.eye(len(env.cells), dtype=bool)
    chance = (1 - env.slip) * np.eye(5) + env.slip / 5          # of move b, given action a

    def solve(v, goal, backup):
        while True:
            new = np.where(goal, 0, backup(v))
            change, v = np.abs(new - v).max(), new
            if change < 1e-9:
                return v

    def moved(v):                                               # (n, 5, n) after each move
        return -1 + discount * v[env.neighbours]

    def q(v):                                                   # (n, 5, n) after each action
        return np.einsum("ab,sbg->sag", chance, moved(v))

    def luck_too(q):
        y = moved(q).reshape(n, 25, n)                          # move b, then action a'
        return np.stack([_expectile(y, q[:, a], chance[a].repeat(5)[:, None], expectile)
                         for a in range(5)], 1)

    start = np.zeros((n, n))
    one = solve(np.zeros((n, 5, n)), goal[:, None], luck_too)
    return {"optimal": solve(start, goal, lambda v: q(v).max(1)),
            "one expectile": np.where(goal, 0, _expectile(one, one.mean(1), 1, expectile)),
            "over actions": solve(start, goal, lambda v: _expectile(q(v), v, 1, expectile)),
            "action-free": solve(start, goal, lambda v: _expectile(moved(v), v, 1, expectile))}


# ------------------------------------------------------------------------------------ drawing


def draw_exact_values(path, env, data, discount=0.95, expectile=0.7):
    """Draw three exact values of task 1's goal as maps.

    -> two fixed points (n, n): of HIQL's loss, and with s' independent of g (`behaviour_counts`).
    """
    at_goal, go_on = goal_counts(env, data, discount, 0.2, 0.5)
    hiql_values = expectile_values(env, at_goal, go_on, discount, expectile)
    behaviour = expectile_values(env, at_goal, behaviour_counts(go_on), discount, expectile)
    maps = {"optimal value": optimal_value(env.distance, discount),
            f"fixed point of HIQL's loss\n(expectile {expectile:g}, hindsight goals)": hiql_values,
            "the same if s' did not depend on g\n(the data's own policy)": behaviour}
    goal = np.array(env.tasks[0][1])
    g = env.index[tuple(goal)]
    figure, axes = plots.panels(1, 3, (12, 4))
    for ax, (title, v) in zip(axes[0], maps.items()):
        image = plots.draw_maze(ax, env, v[:, g], vmin=-1 / (1 - discount), vmax=0)
        ax.plot(*plots.plot_xy(env, env.place(goal)), "r*", ms=12, zorder=3)
        ax.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    plots.save_figure(figure, path)
    return hiql_values, behaviour


def draw_chance(path, discount=0.95, expectile=0.9):
    """Draw the mean of each of `values_under_chance` at each distance, without and with slips."""
    labels = {"max over actions: optimal": "k-", "one expectile of Q(s', a')": "C3-.",
              "IQL: expectile over actions": "C0--", "HIQL: action-free expectile": "C1:"}
    figure, axes = plots.panels(1, 2, (9, 3.2), sharey=True)
    titles = {0.0: "every action does what it says", 0.5: "50% of actions slip"}
    for ax, (slip, title) in zip(axes[0], titles.items()):
        env = envs.make("grid-fourrooms", slip=slip)
        distances = np.arange(1, env.distance.max() + 1)
        values = values_under_chance(env, discount, expectile)
        for (label, line), v in zip(labels.items(), values.values()):
            mean = [v[env.distance == d].mean() for d in distances]
            ax.plot(distances, mean, line, lw=2, label=label)
        ax.set(title=title, xlabel="steps to the goal", xticks=range(0, 21, 5))
    axes[0, 0].set_ylabel("exact value (mean of all pairs)")
    axes[0, 0].legend(fontsize=8)
    plots.save_figure(figure, path)


# ------------------------------------------------------------------------------------ program


def show_exact_values(folder):
    """`python -m lab.exact FOLDER`: both pictures; prints how far apart the fixed points are."""
    os.makedirs(folder, exist_ok=True)
    env = envs.make("grid-fourrooms")
    data = env.dataset(np.random.default_rng(0))
    fixed_point, behaviour = draw_exact_values(os.path.join(folder, "exact_values.png"), env, data)
    distance = np.nanmean(np.abs(fixed_point - behaviour))
    print(f"mean distance of the two fixed points: {distance:.3f}, "
          f"{distance / np.ptp(fixed_point):.1%} of the range")
    draw_chance(os.path.join(folder, "chance.png"))
    print(f"wrote exact_values.png and chance.png to {os.path.abspath(folder)}")


def main():
    p = Parser(prog="python -m lab.exact", description="Exact values on gridworlds.")
    p.add_argument("folder", nargs="?", default="runs", help="where the pictures of the four rooms "
                   "go (default: runs)")
    with one_line_errors():
        show_exact_values(p.parse_args().folder)


if __name__ == "__main__":
    main()
