"""Record data/*.npz anew with OGBench's own code, and compare with the files there.

    python -m lab.record DIR        DIR: the unpacked source of OGBench 1.2.1

The inputs (batch, states, actions) are those of the files; all other numbers are computed by
OGBench. The program writes them into DIR under the names of the files and prints, for each group
of keys, the largest difference; half a minute. data/README.md says what to install, and describes
the files. No other file of this repository needs JAX or MuJoCo.
"""

import nets                             # first: it sets one BLAS thread before numpy loads

import os
import sys

import numpy as np

from support.flags import exit_with_error
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

    found = {key: x for key, x in inputs.items() if key.startswith(("batch/", "config/"))}
    named = ("lr", "discount", "tau", "expectile", "low_alpha", "high_alpha", "rep_dim",
             "subgoal_steps")
    config = {**get_config(), "value_hidden_dims": (32, 32), "actor_hidden_dims": (32, 32),
              **{key: inputs[f"config/{key}"].item() for key in named}}
    batch = {key[6:]: jnp.asarray(x) for key, x in inputs.items()
             if key.startswith("batch/") and key != "batch/idxs"}
    agent = HIQLAgent.create(0, np.asarray(batch["observations"], np.float32),
                             np.asarray(batch["actions"], np.float32), config)
    params = jax.tree_util.tree_map(lambda x: jnp.asarray(x, jnp.float64), agent.network.params)
    agent = agent.replace(network=agent.network.replace(
        params=params, opt_state=agent.network.tx.init(params)))

    def keep(group, tree):
        for name, x in flatten_dict(tree, sep="/").items():
            found[f"{group}/{name.removeprefix('modules_')}"] = np.asarray(x)

    def losses(agent):
        _, info = agent.total_loss(batch, agent.network.params)
        parts = [float(info[f"{name}_loss"]) for name in ("value/value", "low_actor/actor",
                                                          "high_actor/actor")]
        return np.array([*parts, sum(parts)])

    keep("init", params)
    keep("grad", jax.grad(lambda p: agent.total_loss(batch, p)[0])(params))
    keep("fwd", _intermediate(agent, batch, jax, jnp))
    curve = [losses(agent)]
    for update in range(1, 11):
        agent, _ = agent.update(batch)
        curve.append(losses(agent))
        if update in (1, 10):
            keep(f"params{update}", agent.network.params)
            adam = agent.network.opt_state[0]
            keep(f"adam{update}_m", adam.mu)
            keep(f"adam{update}_v", adam.nu)
    for name, x in zip(("value", "low_actor", "high_actor", "total"), np.transpose(curve)):
        found[f"loss/{name}"], found[f"loss_curve/{name}"] = x[0], x
    return found


def _intermediate(agent, batch, jax, jnp):
    """What the losses compute on their way, from the agent's networks: {name: x}."""
    net, config, s = agent.network.select, agent.config, batch["observations"]
    g, s1 = batch["value_goals"], batch["next_observations"]
    found = {"v": jnp.stack(net("value")(s, g)), "v_target": jnp.stack(net("target_value")(s, g)),
             "next_v_target": jnp.stack(net("target_value")(s1, g))}
    found["q"] = batch["rewards"] + config["discount"] * batch["masks"] * found[
        "next_v_target"].min(0)
    found["adv"] = found["q"] - found["v_target"].mean(0)
    for name, goals in (("value_goals", g), ("low_goals", batch["low_actor_goals"]),
                        ("high_targets", batch["high_actor_targets"])):
        found[f"phi_{name}"] = net("goal_rep")(jnp.concatenate([s, goals], -1))
    low = net("low_actor")(s, found["phi_low_goals"], goal_encoded=True)
    high = net("high_actor")(s, batch["high_actor_goals"])
    for level, policy, s2, x in (
            ("low", low, s1, batch["actions"]),
            ("high", high, batch["high_actor_targets"], found["phi_high_targets"])):
        goals, alpha = batch[f"{level}_actor_goals"], config[f"{level}_alpha"]
        v, nv = (sum(net("value")(state, goals)) / 2 for state in (s, s2))
        found.update({
            f"{level}_v": v, f"{level}_nv": nv, f"{level}_adv": nv - v,
            f"{level}_weight": jnp.minimum(jnp.exp((nv - v) * alpha), 100.0),
            f"{level}_mean": policy.mode(), f"{level}_log_prob": policy.log_prob(x)})
    found["eval_action"] = agent.sample_actions(s, batch["high_actor_goals"],
                                                seed=jax.random.PRNGKey(0), temperature=0.0)
    return found


def simulator_steps(source, inputs):
    """Steps of OGBench's simulator: {key: array} as in ogbench_steps.npz.

    source has no effect. inputs: the recorded file; its states and actions are used, and of each
    jump the outlet that is nearest to where it ended.
    """
    import gymnasium
    import mujoco
    import ogbench.locomaze                 # noqa: F401, registers the mazes

    def move(s, a):                         # what PointEnv.step does with its position
        env.reset()
        env.set_xy(s)
        env.data.qpos[:], env.data.qvel[:] = s + 0.2 * a, 0
        mujoco.mj_step(env.model, env.data, nstep=5)
        return env.data.qpos.copy()

    found = {key: x for key, x in inputs.items() if key.endswith(("_s", "_a"))}
    for size in MAZES:
        env = gymnasium.make(f"pointmaze-{size}-v0").unwrapped
        ends, contacts = [], []
        for s, a in zip(inputs[f"{size}_s"], inputs[f"{size}_a"]):
            env.set_xy(s + 0.2 * a)                             # which calls mj_forward
            contacts.append(sum(contact.dist < 0 for contact in env.data.contact))  # not the floor
            ends.append(move(s, a))
        found[f"{size}_s1"], found[f"{size}_contacts"] = np.array(ends), np.array(contacts)
    ends = []                                                   # env is the teleport maze now
    for s, a, s1 in zip(*(inputs[f"jump_{x}"] for x in ("s", "a", "s1"))):
        inlets, outlets = (np.array(env._teleport_info[f"teleport_{x}_xys"])
                           for x in ("in", "out"))
        if np.linalg.norm(inlets - s, axis=1).min() <= 1.5:     # jumped at the end of its step
            s = outlets[np.linalg.norm(outlets - s1, axis=1).argmin()]
        ends.append(move(s, a))
    return {**found, "jump_s1": np.array(ends)}


def main():
    """Record both files into the folder named in sys.argv, and print the differences."""
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        exit_with_error("give the folder of OGBench's source: python -m lab.record DIR")
    for name, make in (("golden_hiql_f64.npz", golden_update),
                       ("ogbench_steps.npz", simulator_steps)):
        old = load_arrays(os.path.join(HERE, "data", name))
        new = make(sys.argv[1], old)
        np.savez_compressed(os.path.join(sys.argv[1], name), **new)
        print(f"{name}: names", "as there" if new.keys() == old.keys() else "not as there")
        for group in dict.fromkeys(key.split("/")[0] for key in old):
            differences = [np.abs(new[key] - old[key]).max() for key in old
                           if key.split("/")[0] == group]
            print(f"    {group}: {max(differences):.2g}")


if __name__ == "__main__":
    main()
