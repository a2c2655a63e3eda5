"""Variants of HIQL, each made from the parts of hiql.py: what a deviation changes, and the paper.

    python -m lab.hiql_variants --variant NAME          also takes all flags of hiql.py

one-head           one value head and its target; Eq. (4) then has no min and no mean [D2]
learned-residual   the expectile's weight by the learned value's residual [D1]
learned-std        a learned standard deviation, without bounds, for the high-level policy and for
                   a Gaussian low-level policy [D7]
reached-by-state   a goal counts as reached in every equal state of the data [D5]
labelled-only      trajectories whose actions --action-free hides are left out altogether: the
                   control of claim 4
positions, rbf, direction, rbf+direction
                   what networks see on OGBench's mazes, instead of the maze's own encoding [D15]
paper              the paper as written: one head, the weight by the learned residual, phi(g), the
                   value first and then the policies, published rates

The paper's text was not at hand: docs/deviations.md says what is known of it. The rates are
OGBench's, `--published-rates`. Sizes, number of updates, discount and k stay those of hiql.py
[D12], and so do the mask [D5] and the target [D3].
"""

import hiql                             # first: it sets one BLAS thread before numpy loads

from dataclasses import dataclass

import numpy as np

import envs
from hiql import concat, mean_value, phi, value
from nets import categorical_log_prob, gaussian_log_prob, mlp, stop_gradient, tree_map
from support.flags import option, parse
from support.runs import Program, one_line_errors, open_run, read_run, run_seeds, show

ENCODINGS = {"positions": "position", "rbf": "rbf", "direction": "direction",
             "rbf+direction": "rbf+direction"}          # {variant: encoding of OGBench's mazes}
VARIANTS = ("one-head", "learned-residual", "learned-std", "reached-by-state", "labelled-only",
            *ENCODINGS, "paper")


@dataclass
class Config(hiql.Config):
    """hiql's config and the variant."""

    variant: str = option("paper", "what differs from hiql.py; see lab/hiql_variants.py", VARIANTS)

    @property
    def agent(self):
        """The name of its runs' folders."""
        return self.variant


PROGRAM = Program("-m lab.hiql_variants", Config, "update", hiql.ACTING)


def resolve(given):
    """A whole Config, as `hiql.resolve`. ValueError also: an encoding for another environment."""
    given, changes = dict(given), {}
    paper = given.get("variant", Config.variant) == "paper"
    if paper:
        given.setdefault("published_rates", True)
        changes["rep_type"] = "phi_g"
    config = hiql.resolve(given, Config, changes)
    if paper and "policy_steps" not in given:
        config.policy_steps = config.steps
    if config.variant in ENCODINGS and not config.env.startswith("pointmaze-"):
        raise ValueError(f"--variant {config.variant} is for OGBench's mazes")
    if config.variant == "labelled-only" and not config.action_free:
        raise ValueError("--variant labelled-only leaves out what --action-free hides; without it "
                         "that is nothing")
    return config


# ---------------------------------------------------------------------------------- the value


def one_head(config, env, data, rngs):
    """Parameters as by `hiql.init_params`, but of the two value heads only the first. With one head
    `hiql.value_loss` is

    L_V = mean( |expectile - 1(A < 0)| (q - V(s, z))^2 ),  q = r + gamma m T(s', z'),
    A = q - T(s, z).
    """
    params = hiql.init_params(config, env, data, rngs)
    params["value"] = tree_map(lambda w: w[:1].copy(), params["value"])
    params["target"]["value"] = tree_map(lambda w: w[:1].copy(), params["target"]["value"])
    return params


def learned_residual(params, batch, config, env):
    """Expectile regression, Eq. (4), whose weight follows the learned value's residual [D1].

    q_j = r + gamma m T_j(s', z'),  A = r + gamma m min_j T_j(s', z') - mean_j V_j(s, z)
    L_V = sum_j mean( |expectile - 1(A < 0)| (q_j - V_j(s, z))^2 ),  z = phi([s; g]), z' at s'
    With one head A = q - V, and L_V is the expectile loss of A itself, as in the paper.
    Shapes and constants as in `hiql.value_loss`.
    """
    s, s1, g, r, m = (batch[x] for x in ("observations", "next_observations", "value_goals",
                                         "rewards", "masks"))
    z, back_phi = phi(params, s, g, config, env)
    z1 = stop_gradient(phi(params, s1, g, config, env)[0])
    v, back_v = value(params["value"], s, z)
    t1 = stop_gradient(value(params["target"]["value"], s1, z1)[0])
    q = r + config.discount * m * t1
    adv = stop_gradient(r + config.discount * m * t1.min(0) - v.mean(0))
    weight = hiql.expectile_weight(config.expectile, adv)
    error = q - v
    dz, grads = back_v(-2 / len(s) * weight * error)
    return (weight * error * error).mean(-1).sum(), {"value": grads, **back_phi(dz)}


# ------------------------------------------------------------------------------- learned std


def with_std(config, env, data, rngs):
    """Parameters as by `hiql.init_params`; Gaussian policies have a log std (A,), at first 0."""
    params = hiql.init_params(config, env, data, rngs)
    for name in ("high", "low"):
        if name == "high" or not env.discrete:
            last = params[name][f"dense{len(config.hidden_dims)}"]
            params[name]["std"] = {"log_std": np.zeros_like(last["b"])}
    return params


def awr(p, x, target, weight):
    """L = -mean(weight log pi(target | x)), pi Gaussian with mean mlp(x) and the learned std, or
    categorical -> loss, gradients of the policy p. Shapes and constants as in `hiql.awr`."""
    output, back_mlp = mlp(p, x)
    log_density = categorical_log_prob if target.dtype.kind == "i" else gaussian_log_prob
    log_prob, back_density = log_density(p.get("std", {}), output, target)
    d_output, d_std = back_density(-weight / len(x))
    grads = back_mlp(d_output)[1]
    if d_std:
        grads["std"] = d_std
    return -(weight * log_prob).mean(), grads


def high_loss(params, batch, config, env):
    """`hiql.high_loss`, Eq. (6), with a learned std [D7]."""
    s, g, w = (batch[x] for x in ("observations", "high_actor_goals", "high_actor_targets"))
    adv = mean_value(params, w, g, config, env) - mean_value(params, s, g, config, env)
    target = phi(params, s, hiql.goal_of(w, config), config, env)[0]
    if config.rep_type == "none":
        target = hiql.goal_of(w, config) - hiql.goal_of(s, config)
    weight = hiql.awr_weight(config.high_alpha, stop_gradient(adv))
    loss, grads = awr(params["high"], env.pair(s, g), stop_gradient(target), weight)
    return loss, {"high": grads}


def low_loss(params, batch, config, env):
    """`hiql.low_loss`, Eq. (7), with a learned std [D7]."""
    s, s1, a, w = (batch[x] for x in ("observations", "next_observations", "actions",
                                      "low_actor_goals"))
    adv = mean_value(params, s1, w, config, env) - mean_value(params, s, w, config, env)
    z = stop_gradient(phi(params, s, w, config, env)[0])
    weight = hiql.awr_weight(config.low_alpha, stop_gradient(adv))
    loss, grads = awr(params["low"], concat(s, z), a, weight)
    return loss, {"low": grads}


# ------------------------------------------------------------------------------------- goals


def reached_by_state(data, rows, rng, config, env):
    """A batch as by `hiql.sample`, but r = m = 0 wherever the state has the goal's entries [D5]."""
    batch = hiql.sample(data, rows, rng, config, env)
    here = hiql.goal_of(batch["observations"], config)
    batch["masks"] = (here != batch["value_goals"]).any(-1).astype(np.float32)
    batch["rewards"] = -batch["masks"]
    return batch


# -------------------------------------------------------------------------------------- data


def labelled_only(config, env, data, rngs):
    """Parameters as by `hiql.init_params`; rows whose action is hidden lose their transition, so
    that they are neither states nor goals of any loss."""
    data.valid = data.labelled
    return hiql.init_params(config, env, data, rngs)


# ------------------------------------------------------------------------------- the program


PARTS = {                               # of each variant: arguments of `hiql.train`
    "one-head": dict(init_params=one_head),
    "learned-residual": dict(losses={**hiql.LOSSES, "value": learned_residual}),
    "learned-std": dict(init_params=with_std,
                        losses={**hiql.LOSSES, "high": high_loss, "low": low_loss}),
    "reached-by-state": dict(sample=reached_by_state),
    "labelled-only": dict(init_params=labelled_only),
    "paper": dict(init_params=one_head, losses={**hiql.LOSSES, "value": learned_residual}),
    **{name: {} for name in ENCODINGS}}


def make_maze(config):
    """The maze of a config, with the variant's encoding; None for data alone."""
    if config.env == "none":
        return None
    if config.variant in ENCODINGS:
        return envs.make(config.env, encoding=ENCODINGS[config.variant])
    return hiql.make_maze(config)


def train(config, run=None):
    """A whole run of the variant, as `hiql.train`."""
    return hiql.train(None, config, run=run, env=make_maze(config),
                      actors={config.variant: hiql.Actor}, **PARTS[config.variant])


def main():
    given, call = parse(PROGRAM, __doc__, hiql.WORDS)
    with one_line_errors():
        if call.eval:
            saved = read_run(PROGRAM, call.eval)
            return show(hiql.evaluate_saved(saved, make_maze(saved.config),
                                            {saved.config.variant: hiql.Actor}))
        config = resolve(given)
        if call.seeds:
            return run_seeds(PROGRAM, call, given, config)
        with open_run(PROGRAM, call, config) as run:
            train(run.config, run)


if __name__ == "__main__":
    main()
