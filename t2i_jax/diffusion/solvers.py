"""Solving the flow, from noise to data.

The flow dz/dt = v(z, t) runs over levels t_0 > t_1 > ... > t_S, mostly from 1 (noise) to 0 (data).
On its path z = alpha x + sigma n, alpha = 1 - t, sigma = t, so that a velocity tells the data, too:

    x = z - t v.

With lambda = log(alpha / sigma) the flow is solved by parts, and from t to t' < t exactly

    z' = (sigma' / sigma) z + sigma' int_lambda^lambda' e^l x(l) dl.                          (1)

All solvers here are one of two kinds, told by a table that holds a row for each step. Tables are
made on the host in float64, from the levels alone, so one compiled program serves all levels.

**Multistep**: one evaluation a step, earlier ones used again:

    z_{i+1} = keep_i z_i + sum_k weights_ik m_{i-k} + noise_i n_i

    euler      m = v; weights t' - t. The published sampler.
    dpmpp_2m   m = x; (1) with x linear in lambda through the two newest points, the integral to
               second order: DPM-Solver++(2M), Lu et al., arXiv 2211.01095, algorithm 2.
    unipc      m = x; as UniP-2 with B(h) = e^h - 1 predicts, and corrected by UniC-2 when the next
               level has been evaluated, with no further evaluation: Zhao et al., arXiv 2302.04867.
    ancestral  m = x; the exact posterior of z' given z and x: what is kept of the old noise makes
               room for new noise, e^-h = sigma' alpha / (sigma alpha'), h = lambda' - lambda,
               z' = alpha' x + sigma' (e^-h (z - alpha x) / sigma + sqrt(1 - e^-2h) n). It is
               DDPM's step (arXiv 2006.11239) on this path, and SDE-DPM-Solver++1.

lambda is infinite at t = 1 and t = 0. The step from 1 and the one to 0 are of first order (x is
constant in them), and the point at 1 is no part of later ones: errors of one step only.

**Two stages**: two evaluations a step, the second at t + node (t' - t):

    midpoint   node 1/2, its velocity alone is used.
    heun       node 1, the mean of both; a step to 0 is Euler's (Karras et al., arXiv 2206.00364).
"""

from collections.abc import Callable, Sequence
import difflib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import ConfigError

Rows = dict[str, Any]  # arrays (S, ...); of one step without the first axis
# (z, t_B, row, guide) -> (v, guide): what guidance carries from one evaluation to the next
Velocity = Callable[[jax.Array, jax.Array, Rows, Any], tuple[jax.Array, Any]]
Draw = Callable[[jax.Array], jax.Array]  # number of the step -> noise (B, ...)


class Solver(NamedTuple):
    """One way of stepping."""

    plan: Callable[[np.ndarray], Rows]  # levels (S + 1,), float64 -> rows beside t and number
    history: int = 0  # earlier predictions that a step uses
    predicts_data: bool = False  # whether m is x, not v
    corrects: bool = False
    evaluations: int = 1  # of the network, a step


class State(NamedTuple):
    """What a solver carries from step to step.

    Attributes:
      z: (B, ...), at the level that the next step starts from.
      before: of a solver that corrects, (B, ...) at the level before; else None.
      history: earlier predictions, the newest first.
      guide: what guidance carries.
    """

    z: jax.Array
    before: jax.Array | None
    history: tuple[jax.Array, ...]
    guide: Any


def find(name: str) -> Solver:
    """Of `SOLVERS`. Raises ConfigError for another name."""
    if name not in SOLVERS:
        near = difflib.get_close_matches(str(name), SOLVERS, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"solver = {name!r} is unknown; known: {', '.join(SOLVERS)}.{hint}")
    return SOLVERS[name]


def plan(name: str, levels: Sequence[float]) -> Rows:
    """The table of a solver for levels (S + 1,): float32 arrays of S rows.

    Raises ConfigError for an unknown solver, ValueError where levels do not fall within [0, 1].
    """
    solver, t = find(name), np.asarray(levels, np.float64)
    if t.ndim != 1 or len(t) < 2 or t[0] > 1 or t[-1] < 0 or (np.diff(t) >= 0).any():
        raise ValueError(f"Levels must fall from at most 1 to at least 0, got {levels}.")
    rows = {"t": t[:-1]} | solver.plan(t)
    rows = {key: np.asarray(value, np.float32) for key, value in rows.items()}
    return rows | {"number": np.arange(len(t) - 1, dtype=np.int32)}


def start(name: str, z: jax.Array, guide: Any = ()) -> State:
    """The state before the first step, at latents z (B, ...)."""
    solver = find(name)
    before = z if solver.corrects else None
    return State(z, before, (jnp.zeros_like(z),) * solver.history, guide)


def step(name: str, state: State, row: Rows, velocity: Velocity, draw: Draw | None = None) -> State:
    """The state a step later; `draw` is called by a solver that adds noise."""
    solver = find(name)
    if solver.evaluations == 2:
        return _two_stages(state, row, velocity)
    z, t = state.z, row["t"]
    v, guide = velocity(z, _rows_of(z, t), row, state.guide)
    used = (z - t * v if solver.predicts_data else v, *state.history)
    if solver.corrects:
        z = row["before"] * state.before + _weighted(row["corrected"], used)
    kept = z if "keep" not in row else row["keep"] * z
    after = kept + _weighted(row["weights"], used)
    if "noise" in row:
        after = after + row["noise"] * draw(row["number"])
    return State(after, z if solver.corrects else None, used[: solver.history], guide)


def solve(
    name: str,
    velocity: Velocity,
    z: jax.Array,
    rows: Rows,
    guide: Any = (),
    draw: Draw | None = None,
) -> jax.Array:
    """All steps of a table, as one `lax.scan`: (B, ...) -> (B, ...)."""

    def one(state, row):
        return step(name, state, row, velocity, draw), None

    state, _ = jax.lax.scan(one, start(name, z, guide), rows)
    return state.z


def _two_stages(state: State, row: Rows, velocity: Velocity) -> State:
    z = state.z
    first, guide = velocity(z, _rows_of(z, row["t"]), row, state.guide)
    between = z + row["dt"] * first
    second, guide = velocity(between, _rows_of(z, row["between"]), row, guide)
    return state._replace(z=z + _weighted(row["weights"], (first, second)), guide=guide)


def _rows_of(z: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.full(z.shape[:1], t)


def _weighted(weights: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
    return sum(weights[k] * term for k, term in enumerate(terms[: len(weights)]))


def _euler(t: np.ndarray) -> Rows:
    return {"weights": np.diff(t)[:, None]}


def _linear_in_lambda(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lambda (S + 1,), and of (1) with x constant: the factors of z and of x, (S,) each."""
    with np.errstate(divide="ignore"):
        lam = np.log1p(-t) - np.log(t)
    keep = t[1:] / t[:-1]
    return lam, keep, (1 - t[1:]) - (1 - t[:-1]) * keep


def _dpmpp_2m(t: np.ndarray) -> Rows:
    lam, keep, gain = _linear_in_lambda(t)
    weights = np.stack([gain, np.zeros_like(gain)], -1)
    for i in range(1, len(gain)):
        if np.isfinite(lam[i - 1]) and np.isfinite(lam[i + 1]):
            half = 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])
            weights[i] = gain[i] * (1 + half), -gain[i] * half
    return {"keep": keep, "weights": weights}


def _unipc(t: np.ndarray) -> Rows:
    lam, keep, gain = _linear_in_lambda(t)
    steps = len(gain)
    weights, corrected = np.zeros((steps, 2)), np.zeros((steps, 3))
    for i in range(steps):
        past = [i - 1] if i and np.isfinite(lam[i - 1]) else []
        weights[i] = _unified(lam, i, past if np.isfinite(lam[i + 1]) else [], gain[i], 2)
        if i + 1 < steps:  # what is evaluated there corrects the step that led there
            *old, new = _unified(lam, i, [*past, i + 1], gain[i], 3)
            corrected[i + 1] = new, *old
    before = np.append(1.0, keep[:-1])  # nothing corrects the first latents
    return {"keep": keep, "weights": weights, "before": before, "corrected": corrected}


def _unified(lam: np.ndarray, i: int, points: Sequence[int], gain: float, size: int) -> np.ndarray:
    """The weights of x_i, x_{i-1} (and, of 3, last x_{i+1}) in a step of UniPC from level i.

    With r_k = (lambda_k - lambda_i) / h for the points k beside i, UniPC takes (1) to be
    gain (x_i + sum_k rho_k (x_k - x_i) / r_k), with rho solving sum_k r_k^(j-1) rho_k = b_j for
    j = 1, 2, ... (eq. 5 and theorem 3.1); rho = 1/2 where there is one point, as its authors have.
    """
    weights = np.zeros(size)
    weights[0] = gain
    if not points:
        return weights
    h = lam[i + 1] - lam[i]
    r = np.array([1.0 if k == i + 1 else (lam[k] - lam[i]) / h for k in points])
    rho = np.array([0.5])
    if len(points) > 1:
        rho = np.linalg.solve(np.vander(r, increasing=True).T, _moments(-h, len(points)))
    for share, k in zip(rho / r, points, strict=True):
        weights[2 if k == i + 1 else 1] = gain * share
        weights[0] -= gain * share
    return weights


def _moments(h: float, count: int) -> np.ndarray:
    """b_j = j! phi_{j+1}(h) / phi_1(h), phi_1 = (e^h - 1) / h, phi_{j+1} = (phi_j - 1 / j!) / h."""
    first = phi = math.expm1(h) / h
    found = []
    for j in range(1, count + 1):
        phi = (phi - 1 / math.factorial(j)) / h
        found.append(math.factorial(j) * phi / first)
    return np.array(found)


def _ancestral(t: np.ndarray) -> Rows:
    alpha, sigma = 1 - t, t
    kept = sigma[1:] * alpha[:-1] / (sigma[:-1] * alpha[1:])  # e^-h
    keep = sigma[1:] * kept / sigma[:-1]
    weights = alpha[1:] - keep * alpha[:-1]
    return {"keep": keep, "weights": weights[:, None], "noise": sigma[1:] * np.sqrt(1 - kept**2)}


def _midpoint(t: np.ndarray) -> Rows:
    dt = np.diff(t)
    weights = np.stack([np.zeros_like(dt), dt], -1)
    return {"dt": dt / 2, "between": t[:-1] + dt / 2, "weights": weights}


def _heun(t: np.ndarray) -> Rows:
    dt = np.diff(t)
    last = t[1:] == 0
    weights = np.stack([np.where(last, dt, dt / 2), np.where(last, 0.0, dt / 2)], -1)
    dt = np.where(last, 0.0, dt)
    return {"dt": dt, "between": t[:-1] + dt, "weights": weights}


SOLVERS: dict[str, Solver] = {
    "euler": Solver(_euler),
    "heun": Solver(_heun, evaluations=2),
    "midpoint": Solver(_midpoint, evaluations=2),
    "dpmpp_2m": Solver(_dpmpp_2m, history=1, predicts_data=True),
    "unipc": Solver(_unipc, history=2, predicts_data=True, corrects=True),
    "ancestral": Solver(_ancestral, predicts_data=True),
}
