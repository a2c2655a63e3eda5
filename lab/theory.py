"""The theory of the HIQL paper in numbers: Propositions 4.1 and 5.1, and the sign of advantages.

Prop. 4.1: with a noisy value two short comparisons (high-level policy, low-level policy) err less
often than one long comparison (flat policy). Here: its closed form and a simulation on a chain of
states, then the exact value plus noise on grid-maze. Prop. 5.1: if V(s, g) = psi(s) phi(g), goals
may be replaced by phi(g) without loss. Here: low-rank values, and a counterexample for phi([s; g]).

    python -m lab.theory                prints the numbers and draws runs/theory.png; 5 seconds
    python -m lab.theory --out DIR      prints the numbers and keeps them in DIR, without a picture
    --seed N                            seed of the noise (default 0)
    python -m lab.theory --run DIR      for a finished run of hiql.py: how often the sign of an
                                        advantage is right, DIR/signal.png; 5 seconds

In shapes (n, n) n is the number of free cells. T is the distance to the goal and k that to the
subgoal, in steps; sigma is the standard deviation of the noise as a share of the value. env is a
gridworld, except in `right_signs`.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import math
import os
import time

import numpy as np
from scipy.stats import norm

import envs
import hiql
from support import plots
from support.flags import Parser
from support.runs import (code_and_versions, generators, one_line_errors, require_free, show,
                          write_json)

CHAINS = (10, 3, 0.3), (25, 5, 0.2), (50, 7, 0.2), (100, 10, 0.2)       # T, k, sigma

# ------------------------------------------------------------------------- Proposition 4.1


def chain_error(distance, sigma):
    """Probability that one comparison of noisy values errs on the chain: closed form, Prop. 4.1.

    States are integers, actions +-1, V(s, g) = -|s - g| (1 + sigma z) with z ~ N(0, 1) for each
    pair. A policy at `distance` from its goal compares the values one step nearer and one step
    farther: it errs with probability Phi(-sqrt(2) / (sigma sqrt(distance^2 + 1))). The distance
    is T for the flat policy, T / k for the high-level policy, whose steps are k long, and k for
    the low-level policy. The sum of the last two bounds the hierarchy's error.
    """
    return norm.cdf(-math.sqrt(2) / (sigma * np.sqrt(np.asarray(distance) ** 2 + 1.0)))


def chain_simulation(T, k, sigma, n, rng):
    """The errors of `chain_error` by n draws of the noise: a dict of shares of the draws.

    flat: the flat policy errs; either: the high-level or the low-level policy errs; first: the
    hierarchy's first action is wrong (it is right if both err).
    """
    def errs(distance, step):                           # the farther state looks better
        nearer, farther = -np.array([[distance - step], [distance + step]]) * (
            1 + sigma * rng.normal(size=(2, n)))
        return farther > nearer

    flat, high, low = errs(T, 1), errs(T, k), errs(k, 1)
    return {"flat": flat.mean(), "either": (high | low).mean(), "first": (high ^ low).mean()}


def first_actions(env, v, k):
    """Whether the first action by v (n, n) is right, for flat and hierarchy: two (n, n) bools.

    Flat policy: the move to the best v(s', g). Hierarchy: the subgoal w has the best v(w, g) among
    the states exactly k steps away; it is the goal itself if that is within k steps or no state is
    k steps away. The action is the move to the best v(s', w). Right: one step nearer to g.
    """
    distance, near = env.distance, env.neighbours
    n, s = len(distance), np.arange(len(distance))[:, None]
    flat = near[s, v[near].argmax(1)]                           # (n, n): where the move leads
    reach = distance == k
    w = np.where(reach[:, :, None], v[None], -np.inf).argmax(1)
    w = np.where((distance <= k) | ~reach.any(1)[:, None], np.arange(n), w)
    hierarchy = flat[s, w]
    return distance[flat, np.arange(n)] < distance, distance[hierarchy, np.arange(n)] < distance


def noisy_first_actions(env, sigma, rng):
    """The share of 20 noisy values -distance (1 + sigma z), z ~ N(0, 1) for each pair of cells, as
    on the chain, by which the first action is right with k 5: (2, n, n), flat and hierarchy."""
    return np.mean([first_actions(env, -env.distance * (
        1 + sigma * rng.normal(size=env.distance.shape)), 5) for _ in range(20)], 0)


def wrong_first_actions(env, v, k):
    """Shares of wrong `first_actions` by a value v (n, n), for flat and hierarchy: a dict.

    wrong_first_*: over pairs at least env.pair_distance steps apart (in a smaller maze the farthest
    pairs); wrong_*_by_distance: over pairs 1, 2, ... steps apart, a list.
    """
    summary, far = {}, env.distance >= min(env.pair_distance, env.distance.max())
    for name, right in zip(("flat", "hierarchy"), first_actions(env, v, k)):
        summary[f"wrong_first_{name}"] = float(1 - right[far].mean())
        summary[f"wrong_{name}_by_distance"] = [
            round(float(1 - right[env.distance == d].mean()), 4)
            for d in range(1, env.distance.max() + 1)]
    return summary


# ------------------------------------------------------------------------- Proposition 5.1


def low_rank_errors(env, rank):
    """Errors of the V(s, g) = psi(s) phi(g) with phi of size `rank` that is nearest to the exact
    value: of the value, the mean in steps, and the share of wrong moves. By SVD."""
    u, size, vt = np.linalg.svd(-env.distance.astype(float))
    v = (u[:, :rank] * size[:rank]) @ vt[:rank]
    right, _ = first_actions(env, v, 5)
    return np.abs(v + env.distance).mean(), 1 - right[env.distance > 0].mean()


def action_insufficiency(env):
    """The one number phi([s; g]) = V*(s, g) determines the value, but not the action.

    Prop. 5.1 asks for phi(g). -> (unsure, wrong), shares of all pairs s != g. unsure: several goals
    have this phi, and no move is right for all of them. wrong: wrong moves of the best policy of
    (s, phi), which makes the move that is right for most of these goals.
    """
    nearer = env.distance[env.neighbours] < env.distance[:, None]            # (n, 5, n)
    unsure, wrong = np.zeros(env.distance.shape), np.zeros(env.distance.shape)
    for s, row in enumerate(env.distance):
        for d in np.unique(row[row > 0]):
            best = nearer[s][:, row == d].mean(1).max()
            unsure[s, row == d], wrong[s, row == d] = best < 1, 1 - best
    return unsure[env.distance > 0].mean(), wrong[env.distance > 0].mean()


# ---------------------------------------------------------------------- signs of advantages


def right_signs(env, data, value, k, rng, n=4000, bins=10):
    """Why a hierarchy helps (the paper's Sec. 4): how often is the sign of an advantage right?

    For n transitions of the data and goals drawn from it, the share for which the advantage and
    the exact decrease of the path length have the same sign. Advantages: V(s1,g) - V(s,g) of the
    flat policy, V(w,g) - V(s,g) of the high-level policy with w k steps ahead, V(s1,w) - V(s,w) of
    the low-level policy. Draws that do not change the path length are left out.
    env: any maze without teleporters; value(s (N,2), g (N,2)) -> (N,).
    -> (middle of each bin of path lengths to g (bins,), {"flat", "high", "low": shares (bins,)});
    the bins have equally many draws
    """
    obs = data.observations
    i = data.valid[data.valid + k <= data.last[data.valid] - 1]
    i, g = rng.choice(i, n), obs[rng.choice(i, n)]
    s, s1, w = obs[i], obs[i + 1], obs[i + k]
    length = env.path_length(s, g)
    edges, shares = np.quantile(length, np.linspace(0, 1, bins + 1)), {}
    for name, (x, y, goal) in {"flat": (s, s1, g), "high": (s, w, g), "low": (s, s1, w)}.items():
        nearer = env.path_length(x, goal) - env.path_length(y, goal)
        before, after = (value(at, goal) for at in (x, y))
        right, moved = nearer * (after - before) > 0, np.abs(nearer) > 1e-6
        shares[name] = np.array([right[moved & (length >= low) & (length <= high)].mean()
                                 for low, high in zip(edges, edges[1:])])
    return (edges[1:] + edges[:-1]) / 2, shares


# ----------------------------------------------------------------------------------- drawing


def draw_theory(path, seed=0, n=20_000):
    """Draw Prop. 4.1 on the chain, simulated with n draws, and on a maze; and Prop. 5.1."""
    rng = np.random.default_rng(seed)
    figure, axes = plots.panels(2, 3, (12, 8.4))
    draw_chain(axes[0], n, rng)
    env = envs.make("grid-maze")
    draw_noisy_maze(axes[1, :2], env, rng)
    draw_low_rank(axes[1, 2], env)
    plots.save_figure(figure, path)


def draw_chain(axes, n, rng):
    """Prop. 4.1 over T, k and sigma on three axes: formula, and simulation with n draws."""
    T = np.unique(np.geomspace(4, 400, 9).astype(int))
    root = np.maximum(np.rint(np.sqrt(T)).astype(int), 1)
    k = np.array([2, 3, 5, 7, 10, 14, 20, 33, 50, 80])
    sigma = np.array([0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5])
    panels = (("k = sqrt(T), sigma 0.1", "distance T to the goal", T, T, root, 0.1 + 0 * T),
              ("T 100, sigma 0.1", "k, steps to the subgoal", k, 100 + 0 * k, k, 0.1 + 0 * k),
              ("T 100, k 10", "noise sigma", sigma, 100 + 0 * sigma, 10 + 0 * sigma, sigma))
    for ax, (title, label, x, T, k, sigma) in zip(axes, panels):
        ax.plot(x, chain_error(T, sigma), "C3-", label="flat policy: formula")
        ax.plot(x, chain_error(T / k, sigma) + chain_error(k, sigma), "C0-",
                label="bound of Prop. 4.1")
        seen = [chain_simulation(*setting, n, rng) for setting in zip(T, k, sigma)]
        for name, style, text in (("flat", "C3o", "flat policy: simulated"),
                                  ("either", "C1s", "one of two policies errs: simulated"),
                                  ("first", "C2^", "first action wrong: simulated")):
            ax.plot(x, [one[name] for one in seen], style, ms=4, label=text)
        ax.set(title=f"chain, {title}", xscale="log", xlabel=label, ylim=(-0.03, 0.82))
        ax.set_xticks(x[::2], map(str, x[::2]))
        ax.minorticks_off()
    axes[0].set_ylabel("probability of error")
    axes[1].legend(fontsize=8, loc="upper center")


def draw_noisy_maze(axes, env, rng):
    """Shares of wrong first actions by the noisy exact value over the distance, for two sigmas."""
    distances = np.arange(1, env.distance.max() + 1)
    for ax, sigma in zip(axes, (0.1, 0.3)):
        share = noisy_first_actions(env, sigma, rng)
        for right, style, text in zip(share, ("C3o-", "C2o-"), ("flat", "hierarchy")):
            ax.plot(distances, [1 - right[env.distance == d].mean() for d in distances], style,
                    ms=3, label=text)
        ax.set(title=f"{env.name}, k 5, sigma {sigma}", xlabel="steps to the goal",
               ylim=(-0.03, 0.82))
    axes[0].set_ylabel("share of wrong first actions")
    axes[0].legend(fontsize=8)


def draw_low_rank(ax, env):
    """Prop. 5.1: errors of value and action over the rank, and of the action with phi([s; g])."""
    ranks = np.array([1, 2, 3, 5, 8, 12, 20, 30, 50, 80, len(env.cells)])
    errors, wrong = zip(*[low_rank_errors(env, rank) for rank in ranks])
    ax.plot(ranks, np.array(errors) / env.distance.max(), "C0o-", ms=3,
            label="value: mean error / range")
    ax.plot(ranks, wrong, "C3o-", ms=3, label="action: share of wrong moves")
    for share, style, text in zip(action_insufficiency(env), (":", "--"), ("unsure", "wrong")):
        ax.axhline(share, color="C1", ls=style,
                   label=f"phi([s; g]) = V*(s, g): best policy {text}")
    ax.set(title=f"{env.name}, Prop. 5.1", xscale="log", xlabel="rank of V(s, g) = psi(s) phi(g)",
           ylim=(-0.03, 0.82))
    ax.set_xticks(ranks[::2], map(str, ranks[::2]))
    ax.minorticks_off()
    ax.legend(fontsize=8)


# ----------------------------------------------------------------------------------- program


def theory_numbers(seed):
    """The numbers of both propositions: {column: number}. Prints those of the chain.

    Chain: of the last of CHAINS, by 1,000,000 draws; maze: wrong first actions on grid-maze, goals
    at least 8 steps away, k 5; shares of wrong moves at a rank, and with phi([s; g]) = V*(s, g).
    """
    rng, numbers = np.random.default_rng(seed), {}
    for T, k, sigma in CHAINS:
        seen = chain_simulation(T, k, sigma, 1_000_000, rng)
        seen["bound"] = chain_error(T / k, sigma) + chain_error(k, sigma)
        print(f"chain, T {T}, k {k}, sigma {sigma}: flat {seen['flat']:.3f}, by the formula "
              f"{chain_error(T, sigma):.3f}; hierarchy {seen['either']:.3f}, bound "
              f"{seen['bound']:.3f}, first action {seen['first']:.3f}")
    numbers.update({f"chain_{name}": share for name, share in seen.items()})
    env = envs.make("grid-maze")
    for sigma in (0.1, 0.2, 0.3):
        right = noisy_first_actions(env, sigma, rng)
        flat, hierarchy = 1 - right[:, env.distance >= 8].mean(1)
        numbers.update({f"maze_flat_{sigma}": flat, f"maze_hierarchy_{sigma}": hierarchy})
    for rank in (1, 3, 8, np.linalg.matrix_rank(env.distance)):
        numbers[f"wrong_at_rank_{rank}"] = low_rank_errors(env, rank)[1]
    unsure, wrong = action_insufficiency(env)
    numbers.update({"unsure_with_phi_sg": unsure, "wrong_with_phi_sg": wrong})
    return {name: float(x) for name, x in numbers.items()}


def show_theory(seed, folder=None):
    """Print the numbers; draw runs/theory.png, or write a folder's summary.json and config.json.

    ValueError: the folder holds a run.
    """
    start = time.perf_counter()
    if folder:
        require_free(folder)
    summary = theory_numbers(seed)
    show(summary)
    os.makedirs(folder or "runs", exist_ok=True)
    if not folder:
        draw_theory(os.path.join("runs", "theory.png"), seed)
        return print("drawn: runs/theory.png")
    write_json(os.path.join(folder, "config.json"), {
        "config": {"theory": True, "seed": seed}, "history": [code_and_versions()]})
    write_json(os.path.join(folder, "summary.json"), {
        "seed": seed, **summary, "train_seconds": round(time.perf_counter() - start, 1)})


def show_signal(folder):
    """`python -m lab.theory --run DIR`: `right_signs` of a run of hiql.py on a maze, drawn."""
    saved, env = hiql.restored(folder)
    config, params = saved.config, saved.agent["params"]
    env, data = hiql.load_data(None, config, generators(config.seed, "data", "hide"), env)
    length, shares = right_signs(
        env, data, lambda s, g: hiql.value_map(params, s, g, config, env), config.subgoal_steps,
        np.random.default_rng(config.seed))
    figure, axes = plots.panels(1, 1, (6, 3.6))
    ax = axes[0, 0]
    for name, text in (("flat", "flat: one step, to the goal"),
                       ("high", f"high-level: {config.subgoal_steps} steps, to the goal"),
                       ("low", "low-level: one step, to the subgoal")):
        ax.plot(length, shares[name], "o-", label=text)
    ax.axhline(0.5, color="k", ls=":", lw=1)            # a coin
    ax.set(xlabel="path length to the goal", ylabel="share of advantages\nwith the right sign",
           ylim=(0.45, 1.02))
    ax.legend(fontsize=8)
    path = os.path.join(folder, "signal.png")
    plots.save_figure(figure, path)
    print(f"drawn: {path}")


def main():
    p = Parser(prog="python -m lab.theory", description="Propositions 4.1 and 5.1 in numbers.")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the simulated noise "
                   "(default 0)")
    p.add_argument("--out", metavar="DIR", help="keep the numbers there instead of drawing them")
    p.add_argument("--run", metavar="DIR", help="a finished run of hiql.py on a maze: draw how "
                   "often the signs of its advantages are right")
    given = p.parse_args()
    with one_line_errors():
        if given.run:
            return show_signal(given.run)
        show_theory(given.seed, given.out)


if __name__ == "__main__":
    main()
