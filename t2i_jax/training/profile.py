"""A trace of some steps by JAX's profiler: <workdir>/profile, a file of each process.

    --config.profile.steps=5                            five steps, after ten others
    --config.profile.steps=5 --config.profile.start=100

Steps are counted from the start or resumption of the run, so every start traces its own. A step
that compiles is never in a trace: where one comes (another shape of batch), the trace ends before
it, and the steps that are still wanted are a second one. Without `profile.steps` there is no trace.
"""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import tempfile

from etils import epath
import jax
from ml_collections import ConfigDict

FOLDER = "profile"
# What XProf reads, and what Perfetto does; the profiler names the first after the host.
_FILES = {"*.xplane.pb": "xplane.pb", "perfetto_trace.json.gz": "perfetto.json.gz"}


class Profile:
    """Opens and ends traces around the steps; to be left with the run.

    `apart(name)` is a context in which no step is under way, and whose time is none of theirs.
    """

    def __init__(
        self,
        profile: ConfigDict,
        workdir: epath.PathLike,
        apart: Callable[[str], contextlib.AbstractContextManager],
    ):
        self._skip, self._left = profile.start, profile.steps
        self._folder, self._apart = epath.Path(workdir) / FOLDER, apart
        self._traced: list[int] = []  # steps of the open trace
        self._open: tempfile.TemporaryDirectory | None = None

    @contextlib.contextmanager
    def step(self, number: int, compiles: bool) -> Iterator[None]:
        """Around a step: traced if it is its turn."""
        if compiles:
            self._end()
        elif self._left and not self._skip and self._open is None:
            self._begin()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if self._skip:
            self._skip -= 1
        if self._open is not None:
            self._traced.append(number)
            self._left -= 1
            if not self._left:
                self._end()

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's calls are many, and slow down what they explain
        with self._apart("profile"):
            self._open = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(
                self._open.name, create_perfetto_trace=True, profiler_options=options
            )

    def _end(self) -> None:
        """The open trace, if there is one, goes to the working directory."""
        if self._open is None:
            return
        with self._apart("profile"), self._open as local:
            self._open = None
            jax.profiler.stop_trace()
            if self._traced:
                self._keep(pathlib.Path(local))
        self._traced = []

    def _keep(self, local: pathlib.Path) -> None:
        first, last = self._traced[0], self._traced[-1]
        # Where XProf looks. The same folder for all processes, which it then shows together.
        to = self._folder / "plugins" / "profile" / f"steps_{first:07d}_{last:07d}"
        to.mkdir(parents=True, exist_ok=True)
        for pattern, name in _FILES.items():
            for file in local.rglob(pattern):
                mine = to / f"host_{jax.process_index():04d}.{name}"
                epath.Path(file).copy(mine, overwrite=True)
        if jax.process_index() == 0:
            print(
                f"profile: steps {first} to {last} are traced in {to}. To look at them: "
                f"tensorboard --logdir={self._folder} (pip install tensorboard xprof), or open "
                "a *.perfetto.json.gz in https://ui.perfetto.dev.",
                flush=True,
            )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:  # steps under way may never end
            self._apart = lambda name: contextlib.nullcontext()
        self._end()
        if self._left and kind is None and jax.process_index() == 0:
            print(f"profile: the run ended {self._left} steps before profile.steps were traced.")
