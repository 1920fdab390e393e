# SPDX-License-Identifier: MIT
"""MAML for reinforcement learning (section 5.3 of the paper): policy gradients inside, TRPO outside.

Axes: T tasks, B trajectories a task, H steps a trajectory, d numbers an observation, a numbers an action,
P parameters. Where the order of steps does not matter, [T, n, ...] has n of them. A trajectory that
ends early is padded with steps whose mask is 0; `adaptation` leaves them out, and no mean counts them.

Inside, theta'_i = theta - alpha ∇L_i(theta), L_i = -mean over steps of log pi_theta(a | s) A, on fixed steps:
its gradient estimates a positive multiple of that of eq. (4), but for the bias of discount and lambda.
Outside, with J_i = dtheta'_i / dtheta, a product of I - alpha H,

    max over theta of  mean_i mean over steps of pi_theta'_i(a | s) / pi_old(a | s) A
    subject to         mean_i KL(pi_old, pi_theta'_i) <= max_kl

on the steps that pi_old took, the adapted policy at the old theta. There the constraint's Hessian is
mean_i J_iᵀ F_i J_i, F_i its Fisher matrix: exact, with no third derivative, as the KL's gradient is 0.
"""

import os
import sys
import time
from functools import partial
from typing import NamedTuple

import autograd.numpy as anp
import numpy as np

import cli
import maml
import nets
from cli import FLOATS, Unusable, count, rate, whole

# Environments ----------------------------------------------------------------------------------


class Navigation:
    """A point in the plane moves by clip(0.1 action, ±0.1) a step towards a goal it does not see.

    goals [T, 2]. reset(rng) -> observations [T, B, 2], all at the origin; step(actions [T, B, 2]) ->
    observations, rewards [T, B], done [T, B]. The reward is minus the distance after the move; done is where
    both coordinates are within 0.01 of the goal's. The oracle's observation ends with the goal.
    """

    horizon, actions = 100, 2

    def __init__(self, goals, trajectories, oracle=False):
        if np.shape(goals) != (len(goals), 2):
            raise ValueError(f"goals have shape {np.shape(goals)}; expected [tasks, 2]")
        self.goals = np.repeat(np.asarray(goals, float)[:, None], trajectories, axis=1)
        self.oracle = oracle

    def reset(self, rng):
        self.position = np.zeros_like(self.goals)
        return self.observe()

    def step(self, actions):
        if actions.shape != self.position.shape:
            raise ValueError(f"actions have shape {actions.shape}; expected {self.position.shape}")
        self.position = self.position + np.clip(0.1 * actions, -0.1, 0.1)
        offset = self.position - self.goals
        return self.observe(), -np.hypot(*np.moveaxis(offset, -1, 0)), (np.abs(offset) < 0.01).all(axis=-1)

    def observe(self):
        return np.concatenate([self.position, self.goals][: 1 + self.oracle], axis=-1)


class Locomotion:
    """Half-cheetah or ant on MuJoCo with the authors' rewards; name "cheetah-vel", "cheetah-dir", "ant-...".

    goals [T]: a velocity (m/s) or a direction (-1, 1) each. Observations [T, B, d]: cheetah qpos[1:], qvel,
    the centre of mass, d = 20; ant qpos, qvel, contact forces clipped to ±1, the torso's rotation and the
    centre of mass, d = 125. With a = clip(action, ±1), and v the centre of mass's x velocity after the step,

        cheetah  r = {-|v - goal|, goal v} - 0.05 |a|²
        ant      r = {1 - |v - goal|, goal v} - 0.005 |a|² - 0.0005 |contact forces|² + 0.05

    in {"...-vel", "...-dir"}, and the ant is done where its state is not finite or its torso's height not
    within [0.2, 1.0]. A step is `frame_skip` physics steps, of 0.01 s (cheetah) or 0.02 s (ant). A trajectory
    that is done stays as it is. Bodies: gymnasium's half_cheetah.xml and ant.xml. One simulation serves all
    trajectories in turn; a row of `states` is what it needs of one (position, velocity, control, and the
    solver's last solution, its start), a row of `seen` what is observed of one: qpos and so on, and v.
    """

    horizon = 200

    def __init__(self, name, goals, trajectories, oracle=False, frame_skip=1):
        if name not in TASKS[1:] or np.ndim(goals) != 1:
            raise ValueError(f"{name}, goals {np.shape(goals)}; expected one of {TASKS[1:]}, goals [tasks]")
        body, self.kind = name.split("-")
        self.ant, self.oracle, self.frame_skip = body == "ant", oracle, frame_skip
        self.goals = np.repeat(np.asarray(goals, float)[:, None], trajectories, axis=1)
        mujoco, self.model = _mujoco("ant.xml" if self.ant else "half_cheetah.xml")
        # MuJoCo would put a state that is not finite back to the start, and the ant never be done for it.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.mujoco, self.actions, self.simulation = mujoco, self.model.nu, mujoco.MjData(self.model)
        names = "QPOS", "QVEL", "WARMSTART", "CTRL"
        self.kept = sum(getattr(mujoco.mjtState, f"mjSTATE_{name}").value for name in names)
        self.states = np.zeros((self.goals.size, mujoco.mj_stateSize(self.model, self.kept)))
        data, more = self.simulation, []
        # mj_step leaves what depends on position and velocity as it was at its last physics step's start.
        self.settle = mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_comVel, mujoco.mj_subtreeVel
        if self.ant:
            self.model.opt.timestep = 0.02
            more = [data.cfrc_ext.reshape(-1), data.xmat[1]]
            self.settle = mujoco.mj_forward, mujoco.mj_rnePostConstraint, mujoco.mj_subtreeVel
        self.parts = [data.qpos, data.qvel, *more, data.subtree_com[1], data.subtree_linvel[1, :1]]  # views
        self.seen = np.zeros((self.goals.size, sum(part.size for part in self.parts)))
        self.contacts = self.seen[:, 29:113]  # of the ant

    def reset(self, rng):
        model, count = self.model, len(self.states)
        start = model.numeric("init_qpos").data if self.ant else model.qpos0
        self.states[...] = 0
        self.states[:, : model.nq] = start + 0.01 * rng.normal(size=(count, model.nq))
        self.states[:, model.nq : model.nq + model.nv] = 0.1 * rng.normal(size=(count, model.nv))
        self.ended = np.zeros(count, bool)
        return self._advance(range(count), 0)

    def step(self, actions):
        if actions.shape != (shape := (*self.goals.shape, self.actions)):
            raise ValueError(f"actions have shape {actions.shape}; expected {shape}")
        a = np.clip(actions.reshape(len(self.states), -1), -1, 1).astype(float)
        self.states[:, -self.actions :] = a
        alive = ~self.ended
        observations = self._advance(np.flatnonzero(alive).tolist(), self.frame_skip)
        goals, velocity, height = self.goals.ravel(), self.seen[:, -1], self.seen[:, 2]
        reward = -np.abs(velocity - goals) if self.kind == "vel" else goals * velocity
        reward = reward - (0.005 if self.ant else 0.05) * (a * a).sum(axis=1)
        if self.ant:
            reward += 0.05 + (self.kind == "vel") - 0.0005 * (self.contacts * self.contacts).sum(axis=1)
            sound = np.isfinite(self.seen).all(axis=1)
            alive, self.ended = alive & sound, self.ended | ~(sound & (0.2 <= height) & (height <= 1))
        reward = np.where(alive, reward, 0)
        return observations, reward.reshape(self.goals.shape), self.ended.reshape(self.goals.shape).copy()

    def _advance(self, trajectories, steps):
        """So many physics steps of some of the trajectories -> the observations of all."""
        mujoco, model, simulation, kept = self.mujoco, self.model, self.simulation, self.kept
        for i in trajectories:
            state = self.states[i]
            mujoco.mj_setState(model, simulation, state, kept)
            mujoco.mj_step(model, simulation, steps)
            mujoco.mj_getState(model, simulation, state, kept)
            for settled in self.settle:
                settled(model, simulation)
            np.concatenate(self.parts, out=self.seen[i])
        if self.ant:
            np.clip(self.contacts, -1, 1, out=self.contacts)
        observed = [self.seen[:, 0 if self.ant else 1 : -1].reshape(*self.goals.shape, -1)]
        return np.concatenate(observed + [self.goals[..., None]] * self.oracle, axis=-1)


def _mujoco(body):
    """The mujoco package, and the model of a body of gymnasium's; Unusable where one is missing."""
    try:
        import gymnasium
        import mujoco
    except ImportError:
        raise Unusable('locomotion needs MuJoCo; pip install "gymnasium[mujoco]"') from None
    mujoco.set_mju_user_warning(lambda _: None)  # which would write a file into the current folder
    folder = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")
    return mujoco, mujoco.MjModel.from_xml_path(os.path.join(folder, body))


# The policy ------------------------------------------------------------------------------------

LOWEST = float(np.log(1e-6))


class LogStd:
    """out = [x, log_std], the same log_std for every x and none below log 1e-6: a policy's last layer."""

    def __init__(self, actions):
        self.shapes, self.view = {"log_std": (actions,)}, (actions,)

    def apply(self, x, w):
        w = anp.where(w <= LOWEST, LOWEST, w)  # anp.maximum has slope 1/2 at LOWEST
        return anp.concatenate([x, w[..., None, :] + anp.zeros_like(x)], axis=-1)

    def forward(self, w, x):
        free, n = (w > LOWEST).astype(w.dtype), x.shape[-1]

        def backward(u, g):
            g[...] = free * u[..., n:].sum(axis=1)

            def tangent(v, dx):
                def finish(du, h):
                    total = free * du[..., n:].sum(axis=1)
                    h[...] = total if h.ndim == 2 else total.sum(axis=0)
                    return du[..., :n]

                return _join(dx, free * v), finish

            return u[..., :n], tangent

        return _join(x, np.maximum(w, LOWEST)), backward


def _join(x, w):
    return np.concatenate([x, np.broadcast_to(w[..., None, :], x.shape)], axis=-1)


def _halves(array):
    middle = array.shape[-1] // 2
    return array[..., :middle], array[..., middle:]


def gaussian_policy(inputs, actions, hidden):
    """pi(a | s) = N(f(s), exp(log_std)²): a Network with outputs [mean, log_std], [T, n, 2a].

    f is an mlp with ReLU, Glorot-uniform weights and zero biases; log_std, one per action, starts at 0.
    """
    layers = nets.mlp((inputs, *hidden, actions), draw=nets.glorot_uniform).layers
    return nets.Network([*layers, LogStd(actions)], (inputs,), (2 * actions,))


def log_density(out, action):
    """log N(action; mean, exp(log_std)²) of each number of an action: [T, n, a], out = [mean, log_std]."""
    mean, log_std = _halves(out)
    z = (action - mean) * anp.exp(-log_std)
    return -0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi).astype(out.dtype)


def kl(old, new):
    """KL(old ‖ new) = E_old[log pi_old - log pi_new] at each step, [T, n], of the policies' outputs."""
    (m0, l0), (m1, l1) = _halves(old), _halves(new)
    return anp.sum(l1 - l0 + 0.5 * (anp.exp(2 * l0) + (m0 - m1) ** 2) * anp.exp(-2 * l1) - 0.5, axis=-1)


def fisher(out):
    """The Hessian of kl(out, ·) at out, diagonal: 1 / sigma² for a mean, 2 for a log_std; shaped as out."""
    _, log_std = _halves(out)
    return np.concatenate([np.exp(-2 * log_std), np.full_like(log_std, 2)], axis=-1)


class PolicyGradient:
    """L = -Σ over steps of w log pi(a | s), an output loss of nets.py; y = [a, w], w repeated to a's shape.

    With w = advantage / steps it is the loss of the inner update, and its gradient is minus that of
    the surrogate mean of pi_theta' / pi_old A at pi_old = pi_theta', where the ratio is 1.
    """

    def value(self, out, y):
        action, weight = _halves(y)
        return -anp.sum(weight * log_density(out, action), axis=(1, 2))

    def expand(self, out, y):
        (mean, log_std), (action, weight) = _halves(out), _halves(y)
        inverse = np.exp(-log_std)
        z = (action - mean) * inverse
        slope = weight * z * inverse
        u = np.concatenate([-slope, -weight * (z * z - 1)], axis=-1)
        # The Hessian in an action's mean and log_std: [[w / sigma², 2 w z / sigma], [2 w z / sigma, 2 w z²]].
        diagonal = np.concatenate([weight * inverse * inverse, 2 * weight * z * z], axis=-1)
        mixed = np.tile(2 * slope, 2)

        def second(d_out):
            d_mean, d_log = _halves(d_out)
            return diagonal * d_out + mixed * np.concatenate([d_log, d_mean], axis=-1)

        return self.value(out, y), u, second


# Sampling --------------------------------------------------------------------------------------


class Episodes(NamedTuple):
    """observations [T, B, H, d], actions [T, B, H, a], rewards [T, B, H], mask [T, B, H]: 1 until the end."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray

    def returns(self):
        """Σ_t r_t, undiscounted, its mean over a task's trajectories: [T]."""
        return self.rewards.sum(axis=2).mean(axis=1)


def rollout(environment, policy, theta, rng):
    """Trajectories of pi_theta, theta [P] or [T, P], in all tasks at once -> Episodes, in theta's dtype.

    A trajectory's last step is the one that the environment calls done, or the horizon's.
    """
    observation = environment.reset(rng).astype(theta.dtype)
    shape = *observation.shape[:2], environment.horizon
    numbers = observation.shape[2:], (environment.actions,), (), ()
    episodes = Episodes(*(np.zeros(shape + each, theta.dtype) for each in numbers))
    alive = np.ones(shape[:2], bool)
    for t in range(environment.horizon):
        episodes.observations[:, :, t] = observation  # also what the last action of a trajectory led to
        if not alive.any():
            break
        mean, log_std = _halves(policy.forward(theta, observation)[0])
        action = mean + np.exp(log_std) * rng.standard_normal(mean.shape, theta.dtype)
        episodes.actions[:, :, t] = action
        observation, reward, done = environment.step(action)
        observation = observation.astype(theta.dtype)
        episodes.rewards[:, :, t], episodes.mask[:, :, t] = np.where(alive, reward, 0), alive
        alive &= ~done
    return episodes


# Estimators ------------------------------------------------------------------------------------


def discounted(x, discount):
    """y_t = x_t + discount y_{t+1}, 0 beyond the horizon; x [..., H] -> [..., H]."""
    discount = float(discount)  # a NumPy scalar would promote
    y, total = np.zeros_like(x, np.result_type(x, discount)), 0
    for t in reversed(range(x.shape[-1])):
        y[..., t] = total = x[..., t] + discount * total
    return y


def features(observations):
    """[o, o², t/100, (t/100)², (t/100)³, 1], o clipped to ±10: [T, B, H, 2d + 4], float64."""
    o = np.clip(observations, -10, 10).astype(float)
    t = np.broadcast_to(np.arange(o.shape[2])[:, None] / 100, o.shape[:3] + (1,))
    return np.concatenate([o, o * o, t, t**2, t**3, np.ones_like(t)], axis=-1)


def baseline(observations, targets, mask, ridge=1e-5):
    """V(s_t) = features · w, w by ridge regression of the targets, per task: -> [T, B, H], 0 where mask is 0.

    w = (ΦᵀΦ + ridge I)⁻¹ Φᵀ targets over a task's steps, by one batched solve.
    """
    phi = np.where(mask[..., None], features(observations), 0)  # where mask is 0 they may be NaN
    phi = phi.reshape(len(phi), -1, phi.shape[-1])
    y = targets.reshape(len(phi), -1, 1)
    gram, right = phi.mT @ phi, phi.mT @ y
    w = np.linalg.solve(gram + ridge * np.eye(phi.shape[-1]), right)
    return (phi @ w).reshape(targets.shape).astype(np.result_type(targets, np.float32))


def advantages(rewards, values, mask, discount, lam):
    """A_t = Σ_k (discount lam)^k δ_{t+k}, δ_t = r_t + discount V_{t+1} - V_t, [T, B, H]; 0 where mask is 0.

    V is 0 after the last step, at the horizon too. Normalised over a task's steps to mean 0 and (population)
    standard deviation 1.
    """
    discount, lam = float(discount), float(lam)
    following = np.concatenate([values[..., 1:], np.zeros_like(values[..., :1])], axis=-1)
    a = discounted((rewards + discount * following - values) * mask, discount * lam)
    steps = mask.sum(axis=(1, 2), keepdims=True)
    centred = (a - (a * mask).sum(axis=(1, 2), keepdims=True) / steps) * mask
    return centred / (np.sqrt((centred**2).sum(axis=(1, 2), keepdims=True) / steps) + 1e-8)


def batch_of(episodes, discount, lam):
    """Episodes for `PolicyGradient`: x [T, n, d], y [T, n, 2a] = [a, A / steps]; A is 0 where mask is 0."""
    observations, actions, rewards, mask = episodes
    values = baseline(observations, discounted(rewards, discount), mask)
    a = advantages(rewards, values, mask, discount, lam)
    weight = a / mask.sum(axis=(1, 2), keepdims=True)
    y = np.concatenate([actions, np.broadcast_to(weight[..., None], actions.shape)], axis=-1)
    return tuple(array.reshape(len(mask), -1, array.shape[-1]) for array in (observations, y))


# The outer step --------------------------------------------------------------------------------


def surrogate(policy, loss, alpha, theta, supports, query, old):
    """-mean of pi_theta' / pi_old A and mean KL(pi_old ‖ pi_theta') over a task's n steps: -> [2, T].

    theta [P] is adapted anew on the steps that the old policies took, `supports` one (x, y) an inner step;
    old are the outputs of the adapted old policies for the query's x.
    """
    for support in supports:
        theta = theta - alpha * maml.gradient(loss, theta, *support)
    x, y = query
    action, weight = _halves(y)
    new = policy.apply(theta, x)
    change = log_density(new, action) - log_density(old, action)
    ratio = anp.exp(anp.sum(change, axis=-1))
    return anp.stack([-anp.sum(ratio * weight[..., 0], axis=1), anp.mean(kl(old, new), axis=1)])


def outer_problem(loss, alpha, order, theta, batches, map=map):
    """The outer step's problem at theta [P]: -> loss, gradient [P], v ↦ F v, trial ↦ (loss, KL).

    The means over i of `task_problem`; batches[i] are those of one task, or of equally many for every i.
    """
    problems = map(partial(task_problem, loss, alpha, order, theta), batches)
    values, gradients, products, objectives = zip(*problems)

    def mean(parts):
        return sum(parts) / len(batches)

    def mean_at(functions, v):
        return mean(map(lambda function: function(v), functions))

    return mean(values), mean(gradients), partial(mean_at, products), partial(mean_at, objectives)


def task_problem(loss, alpha, order, theta, batches):
    """`outer_problem` of one task, or of T at once, as a mean over them.

    batches are the (x, y) of each inner step, [T, n, ...], and of the adapted policy's, no step padding. With
    J u = (I - alpha H_{S-1}) ... (I - alpha H_0) u, or u where order is 1,

        loss = `surrogate`'s, ratio 1    gradient = Jᵀ ∇L(theta'; query)    F v = Jᵀ (Fisher at theta') J v.
    """
    alpha, (*supports, (x, y)) = float(alpha), batches  # a NumPy scalar would promote
    adapted, hessians = maml.unroll(loss, theta, supports, alpha)
    hessians = hessians if order == 2 else []
    out, backward = loss.network.forward(adapted, x)
    g, tangent = backward(loss.output.expand(out, y)[1])
    metric = fisher(out) / x.shape[1]

    def transposed(v):
        for hessian in reversed(hessians):
            v = v - alpha * hessian(v)
        return v.sum(axis=0) / len(v)

    def product(v):
        v = np.broadcast_to(v, g.shape)
        for hessian in hessians:
            v = v - alpha * hessian(v)
        return transposed(backward(metric * tangent(v)[0])[0])

    def objective(trial):
        return surrogate(loss.network, loss, alpha, trial, supports, (x, y), out).mean(axis=1)

    return -y[..., -1].sum() / len(y), transposed(g), product, objective


def conjugate_gradient(product, b, iterations, tolerance=1e-10):
    """x with product(x) = b, from 0, until |r|² < tolerance: -> x, r = b - product(x) by the recursion."""
    x, r, p, rr = np.zeros_like(b), b, b, b @ b
    for _ in range(iterations if rr else 0):
        z = product(p)
        step = rr / (p @ z)
        x, r = x + step * p, r - step * z
        rr, before = r @ r, rr
        if rr < tolerance:
            break
        p = r + rr / before * p
    return x, r


def trust_region_step(theta, value, gradient, product, objective, max_kl, cg_steps, damping, ratio, tries):
    """theta - ratio^j step, the first j = 0, 1, ... that lowers the loss within max_kl: -> theta, j, kl.

    step = sqrt(2 max_kl / (xᵀAx + 1e-8)) x, A x = gradient, A = product + damping I. At theta the loss is
    value; objective(theta) -> loss, kl. Where no j < tries will do, theta stays and j = tries.
    """
    x, residual = conjugate_gradient(lambda v: product(v) + float(damping) * v, gradient, cg_steps)
    if not np.isfinite(x).all():
        raise FloatingPointError("the natural gradient is not finite")
    step = np.sqrt(2 * max_kl / (x @ (gradient - residual) + 1e-8)).astype(x.dtype) * x
    for j in range(tries):
        trial = theta - x.dtype.type(ratio**j) * step
        loss, divergence = objective(trial)
        if loss < value and divergence <= max_kl:
            return trial, j, divergence
    return theta, tries, 0.0


# The experiments -------------------------------------------------------------------------------

# The authors' settings (not all are the paper's), but for what the README's departures 11 and 12 say.
TASKS = cli.COMMANDS["rl.py"]
share = cli.checked(float, lambda x: 0 <= x <= 1, "share (0 to 1)")
# fmt: off
SETTINGS = cli.table_of(  # what a checkpoint keeps
    TASKS,
    # in the order of TASKS: navigation, cheetah-vel, cheetah-dir, ant-vel, ant-dir
    ("meta_batch",   count,  40,   40,   40,   20,   20,   "tasks per meta-iteration"),
    ("trajectories", count,  20,   20,   20,   20,   40,   "trajectories per task and step, K"),
    ("steps",        whole,  1,    1,    1,    1,    1,    "inner gradient steps in training (baselines 0)"),
    ("order",        (1, 2), 2,    2,    2,    2,    2,    "1 drops the second derivatives"),
    ("alpha",        rate,   0.5,  0.1,  0.1,  0.1,  0.1,  "inner step size (baselines: rl.ALPHA)"),
    ("iterations",   count,  100,  475,  100,  375,  575,  "meta-iterations in all"),
    ("max_kl",       rate,   0.01, 0.01, 0.02, 0.01, 0.01, "outer KL limit, nats; --resume may set it"),
    ("hidden",       count,  100,  100,  100,  100,  100,  "units of both hidden layers"),
    ("horizon",      count,  100,  200,  200,  200,  200,  "steps of a trajectory"),
    ("frame_skip",   count,  None, 1,    1,    1,    1,    "physics steps an action lasts"),
    ("discount",     share,  0.99, 0.99, 0.99, 0.99, 0.99, "discount of rewards, per step"),
    ("lam",          share,  1.0,  0.95, 0.95, 0.95, 0.95, "lambda of the advantages"),
    ("cg_steps",     count,  10,   20,   20,   20,   20,   "steps of the conjugate gradient"),
    ("damping",      rate,   1e-5, 1e-5, 1e-5, 1e-5, 1e-5, "added to the Fisher product"),
    ("backtrack",    share,  0.8,  0.8,  0.8,  0.8,  0.8,  "factor of the line search"),
    ("tries",        count,  15,   15,   15,   15,   15,   "step sizes the line search tries"),
    ("seed",         whole,  0,    0,    0,    0,    0,    "seed of weights, goals and trajectories"),
    ("dtype", FLOATS, *["float32"] * 5, "number type of policies and their gradients"),
)
EVALUATION = cli.table_of(  # may differ at every evaluation
    TASKS,
    ("eval_tasks",        count, 40,  40,  40,  40,  40,   "unseen tasks for the table"),
    ("eval_trajectories", count, 40,  20,  20,  20,  40,   "trajectories per task and step in the table"),
    ("eval_steps",        whole, 3,   3,   3,   3,   3,    "largest number of gradient steps in the table"),
    ("eval_shrink",       rate,  0.5, 0.5, 0.5, 0.5, 0.01, "factor of alpha after the first step"),
)
ALPHA = {  # with which the authors adapt what was not meta-trained
    "pretrained": (0.5, 0.02, 0.2, 0.2, 0.2),
    "random":     (0.5, 0.1,  0.5, 0.5, 0.5),
    "oracle":     (0.5, 0.1,  0.1, 0.1, 0.1),  # not adapted: the table's own
}
# fmt: on
SIZES = {"navigation": (2, 2, 2), "cheetah": (20, 6, 1), "ant": (125, 8, 1)}  # observation, action, goal
METHODS, BASELINES = ("maml",), tuple(ALPHA)
OUTER = "max_kl"  # the outer step size

# The authors' figures, from their result files: (task, method) -> mean return after 0, 1, 2, 3 steps.
PAPER = {
    ("navigation", "maml"): ("-40.4", "-11.7", "-3.3", "-3.2"),
    ("navigation", "pretrained"): ("-40.8", "-19.7", "-11.7", "-8.5"),
    ("navigation", "random"): ("-82.7", "-58.0", "-53.8", "-46.8"),
    ("navigation", "oracle"): ("-2.3",),
    ("cheetah-vel", "maml"): ("-129.5", "-78.6", "-66.6", "-60.8"),
    ("cheetah-dir", "maml"): ("-50.7", "293.2", "313.5", "315.7"),
    ("ant-vel", "maml"): ("30.6", "96.7", "100.1", "101.4"),
    ("ant-dir", "maml"): ("8.7", "499.2", "500.7", "499.1"),
}

PARCEL = 10  # tasks whose trajectories are sampled at once
VALIDATE_EVERY, VALIDATION_TASKS, VALIDATION_TRAJECTORIES = 5, 20, 20


def environment_of(settings, goals, trajectories):
    """The environment that these settings name."""
    oracle = settings["method"] == "oracle"
    if settings["task"] == "navigation":
        environment = Navigation(goals, trajectories, oracle)
    else:
        environment = Locomotion(settings["task"], goals, trajectories, oracle, settings["frame_skip"])
    environment.horizon = settings["horizon"]
    return environment


def drawn_goals(task, rng, count):
    """`count` tasks: positions in [-0.5, 0.5]², [count, 2], velocities in [0, 2] or [0, 3], or ±1 [count]."""
    if task == "navigation":
        return rng.uniform(-0.5, 0.5, (count, 2))
    body, _, kind = task.partition("-")
    if body not in ("cheetah", "ant") or kind not in ("vel", "dir"):
        raise ValueError(f"{task}; expected navigation, or cheetah or ant with -vel or -dir")
    top = 2.0 if body == "cheetah" else 3.0
    draws = rng.uniform(0, top, count)
    return draws if kind == "vel" else np.where(draws < top / 2, -1.0, 1.0)


def test_goals(task, count):
    """The authors' test tasks, by NumPy's legacy RandomState(1), of ant-dir RandomState(2)."""
    return drawn_goals(task, np.random.RandomState(2 if task == "ant-dir" else 1), count)  # noqa: NPY002


def adaptation(settings, loss, theta, trajectories, rates, goals, seeds):
    """Trajectories of theta, [P] or [T, P], before and after each inner step: yields Episodes, batches.

    theta_{s+1} = theta_s - rates[s] ∇L(theta_s; batch) in each task, whose batch is that of the
    steps taken, x [1, n, d], y [1, n, 2a]. Seeds: one more than rates.
    """
    environment = environment_of(settings, goals, trajectories)
    theta = np.broadcast_to(theta, (len(goals), theta.shape[-1]))
    for seed, alpha in zip(seeds, [*rates, None]):
        episodes = rollout(environment, loss.network, theta, np.random.default_rng(seed))
        x, y = batch_of(episodes, settings["discount"], settings["lam"])
        taken = episodes.mask.reshape(len(goals), -1) > 0
        batches = [(x[i : i + 1, steps], y[i : i + 1, steps]) for i, steps in enumerate(taken)]
        yield episodes, batches
        if alpha is not None:
            slopes = cli.threads()(loss.grad, theta[:, None], *zip(*batches))
            theta = theta - float(alpha) * np.concatenate([*slopes])


def experience(*given):
    """From `adaptation`: the returns [steps + 1, T], and the steps + 1 batches of each task."""
    returns, batches = zip(*((episodes.returns(), batches) for episodes, batches in adaptation(*given)))
    return np.stack(returns), [*zip(*batches)]


def returns_along(*given):
    """From `adaptation`: the returns alone."""
    return np.stack([episodes.returns() for episodes, _ in adaptation(*given)]).astype(float)


class Experiment:
    """A distribution of goals, its environment and policy, and the method that learns it, by name."""

    columns, watched = ("before", "after", "kl", "backtracks", "validation"), "return"
    log_every, save_every, smoothed, keeps_best, spreads, validation = 1, 10, 1, True, True, ""
    metric_name, scale, digits = "return", 1, 1
    heading = "return: mean ± 95 % interval"
    stream = maml.Experiment.stream

    def __init__(self, settings):
        self.settings, self.method, self.alpha = settings, settings["method"], settings["alpha"]
        self.table_defaults = {row.name: row.defaults[settings["task"]] for row in EVALUATION}
        inputs, actions, goal = SIZES[settings["task"].split("-")[0]]
        inputs += goal * (self.method == "oracle")
        self.policy = gaussian_policy(inputs, actions, (settings["hidden"],) * 2)
        self.loss = nets.Loss(self.policy, PolicyGradient())
        self.map = map if settings["task"] == "navigation" else cli.processes()
        self.picture = "paths" if settings["task"] == "navigation" else "body"

    def open(self, data, asked):
        environment_of(self.settings, test_goals(self.settings["task"], 1), 1)

    def start(self):
        return maml.State.start(self.policy.init(self.stream("init"), self.settings["dtype"]), moments=0)

    def spread(self, function, theta, trajectories, rates, goals, rng, map):
        """[function(what `adaptation` takes) of each parcel of goals], e.g. `experience`.

        A parcel is goals and a seed for each sampling, so that results do not depend on who computes it.
        """
        parcels = np.split(goals, range(PARCEL, len(goals), PARCEL))
        seeds = rng.integers(2**63, size=(len(rates) + 1, len(parcels))).T
        one = partial(function, self.settings, self.loss, theta, trajectories, rates)
        return list(map(one, parcels, seeds))

    def meta_iteration(self, theta, rng, map=map):
        """One outer update: -> theta, (return before, return after, KL, backtracks, steps taken)."""
        s = self.settings
        goals = drawn_goals(s["task"], rng, s["meta_batch"])
        given = theta, s["trajectories"], self.rates(s["steps"]), goals, rng, map
        returns, parcels = zip(*self.spread(experience, *given))
        batches = [batch for parcel in parcels for batch in parcel]
        problem = outer_problem(self.loss, self.alpha, s["order"], theta, batches, cli.threads())
        before, after = np.concatenate(returns, axis=1)[[0, -1]].mean(axis=1)
        constants = (s[name] for name in ("max_kl", "cg_steps", "damping", "backtrack", "tries"))
        theta, tries, divergence = trust_region_step(theta, *problem, *constants)
        taken = sum(x.shape[1] for batch in batches for x, _ in batch)
        return theta, (before, after, divergence, tries, taken)

    def step(self, state, rng, map):
        """`meta_iteration`: -> State, what it reports, but steps a second for the steps taken."""
        began = time.monotonic()
        try:
            theta, (*outcome, taken) = self.meta_iteration(state.theta, rng, map)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} (iteration {state.iteration + 1})") from None
        state = state._replace(theta=theta, iteration=state.iteration + 1)
        return state, (*outcome, taken / (time.monotonic() - began))

    def measure(self, state, outcome):
        before, after, divergence, tries, speed = outcome
        score = self.score(state.theta) if state.iteration % VALIDATE_EVERY == 0 else None
        self.validation = self.validation if score is None else f"  validation {score:.1f}"
        text = f"({before:.1f} before adaptation)  KL {divergence:.4f}  {speed:,.0f} env-steps/s"
        text += "  no step accepted: theta kept" * (tries == self.settings["tries"]) + self.validation
        return (before, after, divergence, tries, "" if score is None else score), text, score

    def score(self, theta):
        """What selects the best checkpoint: the mean return on validation goals after 1 to 3 steps.

        A baseline's counts before them too.
        """
        _, _, *how = self.table_defaults.values()
        curve = self.curve(theta, "validation", VALIDATION_TASKS, VALIDATION_TRAJECTORIES, *how)
        return curve[1 if self.method == "maml" else 0 :].mean()

    def curve(self, theta, purpose, count, trajectories, steps, shrink):
        """The return [steps + 1, count] of unseen tasks after 0 ... steps gradient steps, on new samples."""
        rng, task = self.stream(purpose), self.settings["task"]
        goals = test_goals(task, count) if purpose == "test" else drawn_goals(task, rng, count)
        given = theta, trajectories, self.rates(steps, shrink), goals, rng, self.map
        return np.concatenate(self.spread(returns_along, *given), axis=1)

    def test(self, theta, asked):
        returns = self.curve(theta, "test", *asked.values())
        yield asked["eval_trajectories"], [maml.summarize(r, worst=-np.inf) for r in returns]

    def published(self, trajectories):
        s, compared = self.settings, ("horizon", "frame_skip", "order")
        alike = all(s.get(row.name) == row.defaults[s["task"]] for row in SETTINGS if row.name in compared)
        figures = PAPER.get((s["task"], self.method), ())
        alike = alike and trajectories == self.table_defaults["eval_trajectories"]
        return dict(enumerate(figures)) if alike else {}

    def rates(self, steps, shrink=1):
        """The size of each inner step: alpha, then alpha · shrink. The oracle is not adapted."""
        return [] if self.method == "oracle" else [self.alpha * (shrink if s else 1) for s in range(steps)]


# The command line ------------------------------------------------------------------------------

experiment_of, train = Experiment, maml.train


def build_parser():
    """The command's flags. A flag that was not given is None, and settled by `cli.settings_of`."""
    what = "MAML with TRPO for reinforcement learning"
    first_order = {"dest": "order", "const": 1, "help": "short for --order 1"}
    workers = "sample the trajectories (default: one for each core; navigation, none)"
    return cli.parser_of(sys.modules[__name__], what, first_order, workers)


def conditional_defaults(args, task, method):
    """The defaults that depend on the method: {setting: value}; Unusable where flags do not go together."""
    if (args.steps or args.order == 1) and method != "maml":
        flag = "--steps" if args.steps else "--order 1"
        raise Unusable(f"{flag} is for --method maml; --baseline {method} trains with no inner step")
    if args.backtrack in (0, 1):
        raise Unusable(f"--backtrack {args.backtrack} has no shorter step to try; give one between 0 and 1")
    return {} if method == "maml" else {"steps": 0, "alpha": ALPHA[method][TASKS.index(task)]}


# Pictures --------------------------------------------------------------------------------------

# Gradient steps after which the policy is shown, in colours that the colour-blind can tell apart.
SHOWN = {0: ("before", "#999999"), 1: ("after 1 step", "#56b4e9"), 3: ("after 3 steps", "#0072b2")}


def plot(models, curves, log):
    """What policies do on test tasks before and after adaptation, and the return against gradient steps."""
    draw, height = {"paths": (plot_paths, 2.7), "body": (plot_bodies, 5)}[models[0][0].picture]
    canvas = cli.canvas_of(10, height * len(models) + 0.4)
    left, right = canvas.subfigures(1, 2, width_ratios=[2, 1])
    for part, model in zip(left.subfigures(len(models), 1, squeeze=False)[:, 0], models):
        draw(part, *model)
    lines = {label: line for axes in canvas.axes for line, label in zip(*axes.get_legend_handles_labels())}
    place = {"ncols": 6 if len(lines) < 6 else 3, "loc": "outside lower center"}
    left.legend(lines.values(), lines.keys(), fontsize=9, frameon=False, **place)
    cli.panel(right.subplots(), curves, models[0][0])
    return canvas


def behaviour(experiment, learned, goals, steps):
    """[(name, colour, Episodes)] of these tasks after so many gradient steps at the table's default rates."""
    rates = experiment.rates(max(steps), experiment.table_defaults["eval_shrink"])
    given = learned, experiment.settings["trajectories"], rates, goals, experiment.stream("test"), map
    (along,) = experiment.spread(adaptation, *given)
    shown = [(*SHOWN[step], episodes) for step, (episodes, _) in enumerate(along) if step in steps]
    return shown if rates else [("not adapted", "#009e73", shown[0][-1])]


def plot_paths(canvas, experiment, learned, name):
    """Paths of navigation's point to three test goals, two of each."""
    goals, grid = test_goals("navigation", 3), canvas.subplots(1, 3, sharey=True)
    for when, color, episodes in behaviour(experiment, learned, goals, SHOWN):
        for axes, observations, mask in zip(grid, episodes.observations, episodes.mask):
            for path, taken in zip(observations[:2], mask):
                axes.plot(*path[: int(taken.sum()) + 1, :2].T, color=color, lw=1.3, label=when)
    for axes, goal in zip(grid, goals):
        axes.plot(0, 0, "ko", ms=6, label="start")
        axes.plot(*goal, "*", color="#d55e00", mec="white", ms=15, label="goal")
        axes.set(xlim=(-0.75, 0.75), ylim=(-0.75, 0.75), aspect="equal", xlabel="x")
    grid[0].set(ylabel="y", title=cli.text_of(name))


def plot_bodies(canvas, experiment, learned, name):
    """A body from the side, time downwards: before, and adapted to the least and the greatest test goal."""
    s, goals = experiment.settings, np.sort(test_goals(experiment.settings["task"], 40))[[0, -1]]
    *before, (when, _, after) = behaviour(experiment, learned, goals, (0, 3))
    shown = [(*one, 0) for one in before]
    environment = environment_of(s, goals, 1)
    what = {"dir": "direction", "vel": "velocity"}[environment.kind]
    for i, color in enumerate(("#0072b2", "#d55e00")):
        shown.append((f"{when}, {what} {goals[i].round(1):+g}", color, after, i))
    moments, axes = np.ceil(np.arange(1, 5) * s["horizon"] / 4).astype(int), canvas.subplots()
    for label, color, episodes, task in shown:
        for row, t in enumerate(np.minimum(moments, int(episodes.mask[task, 0].sum()))):
            for part in outlines(environment, episodes.observations[task, 0, t - 1]):
                axes.fill(*(part - [0, 1.5 * row]).T, color=color, ec="white", lw=0.4, label=label)
    ground, step = -1.5 * np.arange(4), environment.model.opt.timestep * s["frame_skip"]
    axes.hlines(ground, 0, 1, color="black", lw=1, transform=axes.get_yaxis_transform())
    axes.axvline(0, color="black", lw=1, ls=":", label="start")
    axes.set(yticks=ground, yticklabels=[f"{second:.1f} s" for second in (moments - 1) * step])
    title = cli.text_of(f"{s['task']}, {name}")
    axes.set(xlabel="metres", title=title, aspect="equal", adjustable="datalim")
    axes.grid(axis="x", lw=0.5)
    axes.spines[:].set_visible(False)


def outlines(environment, observation):
    """A body's capsules and spheres as observed, from the side: corners [parts, 18, 2], x and z in m."""
    mujoco, model, simulation = environment.mujoco, environment.model, environment.simulation
    size, known = (125, 15) if environment.ant else (20, 8)  # all but x, which the centre of mass tells
    simulation.qpos[-known:] = observation[:known]
    mujoco.mj_kinematics(model, simulation)
    mujoco.mj_comPos(model, simulation)
    moved = observation[size - 3 : size] - simulation.subtree_com[1]
    parts = model.geom_bodyid > 0
    radius, half = model.geom_size[parts, :2].T[..., None, None]
    middle = (simulation.geom_xpos[parts] + moved)[:, None, ::2]
    axis = half * simulation.geom_xmat[parts][:, None, [2, 8]]
    angle = np.arctan2(axis[..., 1], axis[..., 0]) + np.linspace(-np.pi / 2, np.pi / 2, 9)
    arc = radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return np.concatenate([middle + axis + arc, middle - axis - arc], axis=1)


main = partial(cli.main, sys.modules[__name__])  # main(argv=None) -> exit code

if __name__ == "__main__":
    import rl  # by this name workers find what they are sent

    sys.exit(rl.main())
