"""A cloud that is not there: programs called gcloud and kubectl that write down how they are called.

gcloud plays one queued resource, and training on its machines. Asked for the state of training it
takes the next of `events`: lines that workers say ("running", "exit 75", or several, one a worker),
or "preempt". With `home`, one machine is real: copies go to that folder, commands run there.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

LIMIT = 120  # seconds, for what takes one
TOOLS = "basename bash cat cp date dirname find flock git grep gzip head hostname mkdir mktemp mv rm"
TOOLS += " chmod sed setsid sleep tail tar timeout tr true"

GCLOUD = r"""
import json, os, shutil, sys
folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(folder + "/calls.jsonl", "a") as out:
    out.write(json.dumps(sys.argv) + "\n")
if "kubectl" in sys.argv[0]:
    sys.exit(open(folder + "/applied.yaml", "w").write(sys.stdin.read()) == 0)
world, words = json.load(open(folder + "/world.json")), sys.argv[1:]
flags = dict(w.split("=", 1) for w in words if w.startswith("--") and "=" in w)
command, status = flags.get("--command", ""), 0

def absent():
    sys.exit("ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource was not found")

if world.get("broken"):
    sys.exit("ERROR: (gcloud) PERMISSION_DENIED: no")
if "describe" in words:
    if world["resource"] == "ABSENT":
        absent()
    print("WARNING: a word on the side", file=sys.stderr)
    print(world["node"] if "tpu-vm" in words else world["resource"])
elif "create" in words:
    world["resource"], world["set_up"], world["training"] = world["created"].pop(0), False, False
elif "delete" in words:
    world["resource"] = "ABSENT"
elif world["resource"] != "ACTIVE":
    status = 255
elif world.get("home"):
    if "scp" in words:
        shutil.copy(words[words.index("scp") + 1], world["home"])
    else:
        os.chdir(world["home"])
        os.execvp("bash", ["bash", "-c", command])
elif "worker.sh check" in command:
    world["set_up"] = True
elif "worker.sh start" in command:
    world["training"] = world["set_up"]
    status = not world["set_up"]
elif "worker.sh idle" in command:
    status = world.get("busy", 0)
elif "worker.sh state" in command:
    event = world["events"].pop(0) if world["training"] else "none"
    if event == "preempt":
        world["resource"], status = "SUSPENDED", 255
    else:
        for worker, said in enumerate(event.split(", ")):
            print(f"t1v-n-w-{worker} {said}", flush=True)
            if said == event and event.startswith("exit"):
                world["training"] = True
        if world.get("suspended_after") == event:
            world["resource"] = "SUSPENDED"
elif "worker.sh tail" in command:
    print("t1v-n-w-0: the last words")
json.dump(world, open(folder + "/world.json", "w"))
sys.exit(status)
"""


class Cloud:
    """A folder with a PATH of its own: the tools that scripts need, and the clouds that they use."""

    def __init__(self, folder: pathlib.Path, clouds: tuple[str, ...] = ("gcloud", "kubectl")):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for tool in TOOLS.split():
            found = shutil.which(tool)
            assert found, f"these tests need {tool}"
            (self.bin / tool).symlink_to(found)
        for name in clouds:
            self.program(name, f"#!{sys.executable} -IS\n{GCLOUD}")
        self.set()

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set(self, resource="ABSENT", node="READY", created=("ACTIVE",) * 9, events=(), **more):
        """What is there when a script starts."""
        world = {"resource": resource, "node": node, "created": created, "events": events}
        world |= {"set_up": False, "training": False} | more
        (self.folder / "world.json").write_text(json.dumps(world))
        (self.folder / "calls.jsonl").write_text("")

    def run(self, script: pathlib.Path | str, *words: str, text=None) -> subprocess.CompletedProcess:
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
        """The words of every call since `set`, without the program's folder."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        words = [json.loads(line) for line in lines]
        return [[pathlib.Path(w[0]).name, *w[1:]] for w in words]

    def steps(self) -> list[str]:
        """What was done, in one word each; questions are left out."""
        names = ("create", "delete", "scp", "idle", "install", "check", "start", "stop", "tail")
        steps = []
        for words in self.calls():
            command = next((w for w in words if w.startswith("--command=")), "")
            last = command.partition("worker.sh ")[2].split(" ")[0].rstrip(";")
            steps += [n for n in names if n in words or (n == last and "tar -x" not in command)]
        return steps
