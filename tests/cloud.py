"""A cloud that is not there: programs named gcloud and kubectl that write down how they are called.

gcloud plays one queued resource, and training on its machines. Asked for the state of training it
takes the next of `events`: lines that workers say ("running", "exit 75", or several, one a worker),
or "preempt". With `home`, one machine is real: copies go to that folder, commands run there.
"""

import os
import pathlib
import shutil
import subprocess

LIMIT = 120  # seconds, for what takes one
TOOLS = "basename bash cat chmod cp date dirname find flock git grep gzip head hostname mkdir"
TOOLS += " mktemp mv rm sed setsid sleep tail tar timeout tr true"

GCLOUD = r"""
folder=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
printf '%s\0' "${0##*/}" "$@" $'\n' >> "$folder/calls"
if [[ $0 == *kubectl ]]; then exec cat > "$folder/applied.yaml"; fi
cd "$folder/world"
read_first() { # FILE: its first line, which goes
  local lines
  mapfile -t lines < "$1"
  REPLY=${lines[0]-exit 0} # what is not foreseen ends
  printf '%s\n' "${lines[@]:1}" > "$1"
}
resource=$(< resource) command= words=" $* "
for word in "$@"; do
  if [[ $word == --command=* ]]; then command=${word#--command=}; fi
done
if [[ $words == *" tpu-vm "*" --batch-size"* ]]; then # which `gcloud alpha` alone has
  echo "ERROR: (gcloud.compute.tpus.tpu-vm) unrecognized arguments: --batch-size" >&2 && exit 2
fi
if [[ -e broken ]]; then echo "ERROR: (gcloud) PERMISSION_DENIED: no" >&2 && exit 1; fi
case "$words" in
  *" describe "*)
    if [[ $resource == ABSENT || ($words == *tpu-vm* && $(< node) == ABSENT) ]]; then
      echo "ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource was not found" >&2
      exit 1
    fi
    echo "WARNING: a word on the side" >&2
    if [[ $words == *tpu-vm* ]]; then cat node; else echo "$resource"; fi
    exit
    ;;
  *queued-resources\ create*)
    read_first created
    echo "$REPLY" > resource
    echo READY > node
    rm -f training
    exit
    ;;
  *queued-resources\ delete*) echo ABSENT > resource; exit ;;
esac
if [[ $resource != ACTIVE ]]; then exit 255; fi
if [[ -e home ]]; then
  cd "$(< home)"
  if [[ $words == *" scp "* ]]; then exec cp "$5" .; fi
  exec bash -c "$command"
fi
case "$command" in
  *"worker.sh start"*) echo > training ;;
  *"worker.sh idle; fi"*) ;;
  *"worker.sh idle"*) if [[ -e busy ]]; then exit 1; fi ;;
  *"worker.sh tail"*) echo "t1v-n-w-0: the last words" ;;
  *"worker.sh state"*)
    REPLY=none
    if [[ -e training ]]; then read_first events; fi
    if [[ $REPLY == preempt ]]; then echo SUSPENDED > resource && exit 255; fi
    if [[ -e suspended_after && $REPLY == "$(< suspended_after)" ]]; then
      echo SUSPENDED > resource
    fi
    worker=0
    while [[ -n $REPLY ]]; do
      echo "t1v-n-w-$worker ${REPLY%%, *}"
      worker=$((worker + 1))
      if [[ $REPLY == *", "* ]]; then REPLY=${REPLY#*, }; else REPLY=; fi
    done
    ;;
esac
"""


class Cloud:
    """A folder with a PATH of its own: the tools that scripts need, and clouds to use."""

    def __init__(self, folder: pathlib.Path, clouds: tuple[str, ...] = ("gcloud", "kubectl")):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for tool in TOOLS.split():
            found = shutil.which(tool)
            assert found, f"these tests need {tool}"
            (self.bin / tool).symlink_to(found)
        for name in clouds:
            self.program(name, f"#!/usr/bin/env bash\nset -eu\n{GCLOUD}")
        self.set()

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set(self, resource="ABSENT", node="READY", created=("ACTIVE",) * 9, events=(), **more):
        """What is there when a script starts; no call was made yet."""
        world = self.folder / "world"
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        state = {"resource": resource, "node": node, "created": created, "events": events} | more
        for name, value in state.items():
            lines = value if isinstance(value, tuple) else (value,)
            (world / name).write_text("".join(f"{line}\n" for line in lines))
        (self.folder / "calls").write_text("")

    def run(self, script: pathlib.Path | str, *words: str, text: str | None = None):
        """A script, in a folder where nothing is."""
        where = self.folder / "elsewhere"
        where.mkdir(exist_ok=True)
        env = {"PATH": str(self.bin), "HOME": str(where), "TMPDIR": str(self.folder)}
        env |= {k: v for k, v in os.environ.items() if k.startswith("GIT_")}
        return subprocess.run(
            [str(script), *words],
            cwd=where,
            env=env,
            input=text,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def calls(self) -> list[list[str]]:
        """The words of every call since `set`."""
        calls = (self.folder / "calls").read_text().split("\n\0")[:-1]
        return [call.removesuffix("\0").split("\0") for call in calls]

    def steps(self) -> list[str]:
        """What was done, in one word each; questions are left out."""
        names = ("create", "delete", "scp", "idle", "install", "check", "start", "stop", "tail")
        steps = []
        for words in self.calls():
            command = next((w for w in words if w.startswith("--command=")), "")
            last = command.partition("worker.sh ")[2].split(" ")[0].rstrip(";")
            steps += [n for n in names if n in words or (n == last and "tar -x" not in command)]
        return steps
