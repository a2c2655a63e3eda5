"""Record data/*.npz anew with OGBench's own code, and compare with the files there.

    python -m lab.record DIR        DIR: the unpacked source of OGBench 1.2.1

The inputs (batch, states, actions) are those of the files; all other numbers are computed by
OGBench. The program writes them into DIR under the names of the files and prints, for each group
of keys, the largest difference. data/README.md says what to install, how the inputs were drawn and
what it printed. It takes half a minute. No other file of this repository needs JAX or MuJoCo.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import argparse
import os
import sys

import numpy as np

from support.flags import Parser, exit_with_error
from support.runs import HERE, load_arrays

MAZES = "medium", "large", "giant", "teleport"


def golden_update(source, inputs):
    """OGBench's HIQL agent on one batch, in float64: {key: array} as in golden_hiql_f64.npz.

    source: folder of OGBench. inputs: the recorded file; its batch/* and config/* are used.
    """
    import jax
    jax.config.update("jax_enable_x64", True)
    sys.path.insert(0, os.path.join(source, "impls"))
    import jax.numpy as jnp
    from agents.hiql import HIQLAgent, get_config
    from flax.traverse_util import flatten_dict

    config = {**get_config(), "value_hidden_dims": (32, 32), "actor_hidden_dims": (32, 32),
              **{key: inputs[f"config/{key}"].item() for key in (
                  "lr", "discount", "tau", "expectile", "low_alpha", "high_alpha", "rep_dim",
                  "subgoal_steps")}}
    batch = {key[6:]: jnp.asarray(x) for key, x in inputs.items()
             if key.startswith("batch/") and key != "batch/idxs"}
    agent = HIQLAgent.create(0, np.asarray(batch["observations"], np.float32),
                             np.asarray(batch["actions"], np.float32), config)
    params = jax.tree_util.tree_map(lambda x: jnp.asarray(x, jnp.float64), agent.network.params)
    agent = agent.replace(network=agent.network.replace(
        params=params, opt_state=agent.network.tx.init(params)))
    found = {key: x for key, x in inputs.items() if key.startswith(("batch/", "config/"))}

    def keep(group, tree):
        found.update({f"{group}/{name.removeprefix('modules_')}": np.asarray(x)
                      for name, x in flatten_dict(tree, sep="/").items()})

    def losses(agent):
        _, info = agent.total_loss(batch, agent.network.params)
        parts = [float(info[key]) for key in ("value/value_loss", "low_actor/actor_loss",
                                              "high_actor/actor_loss")]
        return {"value": parts[0], "low_actor": parts[1], "high_actor": parts[2],
                "total": sum(parts)}

    keep("init", params)
    keep("grad", jax.grad(lambda p: agent.total_loss(batch, p)[0])(params))
    found.update({f"loss/{key}": np.array(x) for key, x in losses(agent).items()})
    found.update({f"fwd/{key}": np.asarray(x) for key, x in _intermediate(agent, batch).items()})
    curve = [losses(agent)]
    for update in range(1, 11):
        agent, _ = agent.update(batch)
        curve.append(losses(agent))
        if update in (1, 10):
            keep(f"params{update}", agent.network.params)
            adam = agent.network.opt_state[0]
            keep(f"adam{update}_m", adam.mu)
            keep(f"adam{update}_v", adam.nu)
    found.update({f"loss_curve/{key}": np.array([row[key] for row in curve]) for key in curve[0]})
    return found


def _intermediate(agent, batch):
    """What the losses compute on their way, from the agent's networks: {key without fwd/: x}."""
    import jax
    import jax.numpy as jnp

    net, config, s = agent.network.select, agent.config, batch["observations"]
    g = batch["value_goals"]
    found = {"v": jnp.stack(net("value")(s, g)), "v_target": jnp.stack(net("target_value")(s, g)),
             "next_v_target": jnp.stack(net("target_value")(batch["next_observations"], g))}
    found["q"] = batch["rewards"] + config["discount"] * batch["masks"] * found[
        "next_v_target"].min(0)
    found["adv"] = found["q"] - found["v_target"].mean(0)
    for name, goals in (("value_goals", g), ("low_goals", batch["low_actor_goals"]),
                        ("high_targets", batch["high_actor_targets"])):
        found[f"phi_{name}"] = net("goal_rep")(jnp.concatenate([s, goals], -1))
    acting = {"low": net("low_actor")(s, found["phi_low_goals"], goal_encoded=True),
              "high": net("high_actor")(s, batch["high_actor_goals"])}
    for level, s2, x in (("low", batch["next_observations"], batch["actions"]),
                         ("high", batch["high_actor_targets"], found["phi_high_targets"])):
        goals = batch[f"{level}_actor_goals"]
        v, nv = (sum(net("value")(state, goals)) / 2 for state in (s, s2))
        found.update({
            f"{level}_v": v, f"{level}_nv": nv, f"{level}_adv": nv - v,
            f"{level}_weight": jnp.minimum(jnp.exp((nv - v) * config[f"{level}_alpha"]), 100.0),
            f"{level}_mean": acting[level].mode(), f"{level}_log_prob": acting[level].log_prob(x)})
    found["eval_action"] = agent.sample_actions(s, batch["high_actor_goals"],
                                                seed=jax.random.PRNGKey(0), temperature=0.0)
    return found


def simulator_steps(inputs):
    """Steps of OGBench's simulator: {key: array} as in ogbench_steps.npz.

    inputs: the recorded file; its states and actions are used, and of each jump the outlet that is
    nearest to where it ended.
    """
    import gymnasium
    import mujoco
    import ogbench.locomaze                 # noqa: F401, registers the mazes

    found = {key: x for key, x in inputs.items() if key.endswith(("_s", "_a"))}
    for size in MAZES:
        env = gymnasium.make(f"pointmaze-{size}-v0").unwrapped
        ends, contacts = [], []
        for s, a in zip(inputs[f"{size}_s"], inputs[f"{size}_a"]):
            env.set_xy(s + 0.2 * a)                             # which calls mj_forward
            contacts.append(sum(contact.dist < 0 for contact in env.data.contact))  # not the floor
            ends.append(_move(env, mujoco, s, a))
        found[f"{size}_s1"], found[f"{size}_contacts"] = np.array(ends), np.array(contacts)
    ends = []                                                   # env is the teleport maze now
    for s, a, s1 in zip(*(inputs[f"jump_{x}"] for x in ("s", "a", "s1"))):
        inlets, outlets = (np.array(env._teleport_info[f"teleport_{x}_xys"])
                           for x in ("in", "out"))
        if np.linalg.norm(inlets - s, axis=1).min() <= 1.5:     # jumped at the end of its step
            s = outlets[np.linalg.norm(outlets - s1, axis=1).argmin()]
        ends.append(_move(env, mujoco, s, a))
    return {**found, "jump_s1": np.array(ends)}


def _move(env, mujoco, s, a):
    """What PointEnv.step does with its position: the move, and five steps of MuJoCo."""
    env.reset()
    env.set_xy(s)
    env.data.qpos[:], env.data.qvel[:] = s + 0.2 * a, 0
    mujoco.mj_step(env.model, env.data, nstep=5)
    return env.data.qpos.copy()


def main():
    """Record both files into the folder named in sys.argv, and print the differences."""
    p = Parser(prog="python -m lab.record", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="DIR", help="unpacked source of OGBench 1.2.1")
    source = p.parse_args().source
    for name, make in (("golden_hiql_f64.npz", lambda x: golden_update(source, x)),
                       ("ogbench_steps.npz", simulator_steps)):
        old = load_arrays(os.path.join(HERE, "data", name))
        try:
            new = make(old)
            np.savez_compressed(os.path.join(source, name), **new)
        except (ImportError, OSError) as e:
            exit_with_error(f"{e}; data/README.md says what to install and to unpack", p.prog)
        same = {key: x.shape for key, x in old.items()} == {k: x.shape for k, x in new.items()}
        print(f"{name}: {len(new)} keys,", "names and shapes as there" if same else "not as there")
        for group in dict.fromkeys(key.split("/")[0] for key in old):
            differences = [np.abs(new[key] - old[key]).max() for key in old
                           if key in new and key.split("/")[0] == group]
            print(f"    {group}: {max(differences, default=np.nan):.2g}")


if __name__ == "__main__":
    main()
