"""Applies one fault after the other to a run and shows the cost of each.

    python tools/try_faults.py CONFIG.toml [--tiny] [--folder DIR] [--only NAME ...] [section.key=value ...]

First the run is done undisturbed. Then, for each fault, it is done again, disturbed in the middle, restarted with the
same command, and compared with the undisturbed run, bit for bit: metrics (without times), samples and final weights.
Prints a Markdown table. Exit code 1 if anything was lost. A step should take a few seconds at most, and the run should
have eight steps or more and save often: checkpoint.every_steps=2. --tiny replaces both models by a random one with the
tokenizer of model.path.
"""

import argparse
import atexit
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.observability.metrics_file import MEASURED, read_metrics
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoints.files import CheckpointFiles


@dataclass
class Trial:
    """One run that a fault disturbs. Its configuration is that of the undisturbed run, except for the folder."""

    config_path: Path
    overrides: Sequence[str]
    folder: RunFolder
    steps: int
    undisturbed: RunFolder
    log: list[str] = field(default_factory=list)

    def start(self, *more: str, **options) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megatron_tip.cli", "train", str(self.config_path), *self.overrides, *more]
        command.append(f"run.folder={self.folder.path}")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)
        atexit.register(process.kill)  # its workers end with it
        return process

    def end(self, process: subprocess.Popen[str]) -> int:
        """Waits for the command and returns its exit code."""
        self.log.append(process.communicate()[1])
        return process.returncode

    def to_step(self, step: int, *more: str, **options) -> subprocess.Popen[str]:
        """Starts the run and returns once `step` is in its metrics."""
        process = self.start(*more, **options)
        self.wait(process, lambda: self.recorded() >= step)
        return process

    def to_save(self, step: int) -> subprocess.Popen[str]:
        """Starts the run and returns during a save of `step` or a later one."""
        process = self.to_step(step)
        self.wait(process, lambda: any(self.folder.checkpoints.glob(".step_*.partial")))
        return process

    def wait(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
        while not condition():
            if process.poll() is not None:
                sys.exit(f"the run ended too early:\n{process.communicate()[1]}")
            time.sleep(0.002)

    def recorded(self) -> int:
        """The last step whose line is whole: the run is writing the file."""
        steps = read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []
        return steps[-1]["step"] if steps else -1

    def workers(self, launcher: subprocess.Popen[str]) -> list[int]:
        """Returns the process ids of the launcher's workers, by rank."""
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {int(_environ(pid)["RANK"]): int(pid) for pid in children if "RANK" in _environ(pid)}
        return [ranks[rank] for rank in sorted(ranks)]

    def kill_all(self, process: subprocess.Popen[str]) -> int:
        for pid in [process.pid, *self.workers(process)]:
            os.kill(pid, signal.SIGKILL)
        return self.end(process)

    def newest_shard(self) -> Path:
        files = CheckpointFiles(self.folder.checkpoints)
        return max((files.step_folder(files.steps()[-1]) / "shards").glob("*.distcp"))


def _environ(pid: str) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def kill_between_steps(trial: Trial) -> int:
    """SIGKILL to all processes, between saves"""
    return trial.kill_all(trial.to_step(trial.steps // 2 + 1))


def kill_while_saving(trial: Trial) -> int:
    """SIGKILL to all processes while a checkpoint is written"""
    return trial.kill_all(trial.to_save(trial.steps // 2))


def kill_launcher(trial: Trial) -> int:
    """SIGKILL to the command alone; its workers end by themselves"""
    process = trial.to_step(trial.steps // 2)
    workers = trial.workers(process)
    process.kill()
    code = trial.end(process)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    return code


def kill_worker(trial: Trial) -> int:
    """SIGKILL to the last worker"""
    process = trial.to_step(trial.steps // 2)
    os.kill(trial.workers(process)[-1], signal.SIGKILL)
    return trial.end(process)


def _signal(number: signal.Signals) -> Callable[[Trial], int]:
    def strike(trial: Trial) -> int:
        process = trial.to_step(trial.steps // 2)
        process.send_signal(number)
        return trial.end(process)

    strike.__doc__ = f"{number.name} to the command"
    return strike


def worker_told_to_stop(trial: Trial) -> int:
    """SIGUSR1 to one worker alone, as SLURM's srun passes it on"""
    process = trial.to_step(trial.steps // 2)
    os.kill(trial.workers(process)[-1], signal.SIGUSR1)
    return trial.end(process)


def second_signal(trial: Trial) -> int:
    """SIGTERM to the command, and another one at once"""
    process = trial.to_step(trial.steps // 2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    return trial.end(process)


def hang(trial: Trial) -> int:
    """the last worker stands still (SIGSTOP); fault.step_timeout_seconds = 20"""
    process = trial.to_step(trial.steps // 2, "fault.step_timeout_seconds=20")
    os.kill(trial.workers(process)[-1], signal.SIGSTOP)
    return trial.end(process)


def damage(trial: Trial) -> int:
    """the newest checkpoint has a flipped bit"""
    code = trial.kill_all(trial.to_step(trial.steps - 1))
    shard = trial.newest_shard()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return code


def lost_file(trial: Trial) -> int:
    """the newest checkpoint lost a file"""
    code = trial.kill_all(trial.to_step(trial.steps - 1))
    trial.newest_shard().unlink()
    return code


def full_disk(trial: Trial) -> int:
    """no space for a checkpoint (a limit on the size of files)"""
    limit = trial.undisturbed.path / "checkpoints"
    smallest = min(path.stat().st_size for path in limit.rglob("*.distcp"))

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, smallest // 2))

    return trial.end(trial.start(preexec_fn=restrict))


def failed_engine(trial: Trial) -> int:
    """the rollout engine fails (a replay without its next batch), and is mended"""
    batches = trial.folder.path.with_name("batches")
    shutil.rmtree(batches, ignore_errors=True)
    shutil.copytree(trial.undisturbed.rollouts, batches)
    missing = batches / f"step_{trial.steps // 2 + 1:06d}.jsonl"
    content = missing.read_bytes()
    missing.unlink()
    trial.overrides = [*trial.overrides, "rollout.engine=replay", f"rollout.replay_folder={batches}"]
    code = trial.end(trial.start())
    missing.write_bytes(content)
    return code


FAULTS: dict[str, Callable[[Trial], int]] = {
    "kill": kill_between_steps,
    "kill_while_saving": kill_while_saving,
    "kill_launcher": kill_launcher,
    "kill_worker": kill_worker,
    "sigterm": _signal(signal.SIGTERM),
    "sigusr1": _signal(signal.SIGUSR1),
    "sigint": _signal(signal.SIGINT),
    "worker_sigusr1": worker_told_to_stop,
    "second_signal": second_signal,
    "hang": hang,
    "damage": damage,
    "lost_file": lost_file,
    "full_disk": full_disk,
    "failed_engine": failed_engine,
}


@dataclass(frozen=True)
class Row:
    """The cost of a fault. `message`: the command's last message. `again`: steps repeated. `lost`: what differs."""

    fault: str
    exit_code: int
    seconds: float
    message: str
    again: int
    lost: list[str]

    def markdown(self) -> str:
        lost = ", ".join(self.lost) or "nothing"
        return f"| {self.fault} | {self.exit_code} | {self.message} | {self.again} | {lost} |"


def try_fault(name: str, trial: Trial) -> Row:
    """Applies the fault `name` to `trial`, continues the run to its end and compares it."""
    strike = FAULTS[name]
    start = time.monotonic()
    exit_code = strike(trial)
    seconds = time.monotonic() - start
    message = _message(trial.log[-1])
    recorded = trial.recorded()
    if (code := trial.end(trial.start())) != 0:
        sys.exit(f"{name}: the run does not continue (exit code {code}):\n{trial.log[-1]}")
    found = re.search(r"continuing after step (\d+)", trial.log[-1])
    again = max(0, recorded - int(found[1] if found else 0))
    return Row(strike.__doc__ or name, exit_code, seconds, message, again, differences(trial))


def differences(trial: Trial) -> list[str]:
    """Returns which results of the disturbed run differ from those of the undisturbed one."""
    found = []
    for name, read in (("metrics", _metrics), ("weights", _weights), ("samples", _samples)):
        if read(trial.folder) != read(trial.undisturbed):
            found.append(name)
    return found


def _metrics(folder: RunFolder) -> list[dict[str, float]]:
    lines = read_metrics(folder.metrics)
    # A replayed batch keeps the weight version that generated it.
    return [{key: line[key] for key in line if not key.startswith((*MEASURED, "rollout/num_stale"))} for line in lines]


def _weights(folder: RunFolder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.hf.glob("*.safetensors"))]


def _samples(folder: RunFolder) -> str:
    return folder.samples.read_text()


def _message(log: str) -> str:
    """Returns the command's last error message, or "" if there was none."""
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    return re.sub(r"/\S*/", "", lines[-1].removeprefix("error: ")) if lines else ""


def try_faults(config_path: Path, overrides: Sequence[str], folder: Path, names: Sequence[str]) -> list[Row]:
    """Returns one row per fault, each run in its own folder below `folder`. Prints each row when it is ready."""
    config: Config = load_config(config_path, overrides)
    undisturbed = RunFolder(folder / "undisturbed")
    steps = config.training.steps
    first = Trial(config_path, overrides, undisturbed, steps, undisturbed)
    if first.end(first.start()):
        sys.exit(f"the undisturbed run fails:\n{first.log[-1]}")
    print("| Fault | Exit code | The command says | Steps again | Lost |\n|---|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        rows.append(try_fault(name, Trial(config_path, overrides, RunFolder(folder / name), steps, undisturbed)))
        print(rows[-1].markdown(), flush=True)
    return rows


def tiny_model(source: Path, target: Path) -> None:
    """Writes a random Llama of four layers with the tokenizer and the vocabulary of `source`."""
    import torch  # late, like transformers: a wrong command line is refused without waiting for these imports
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


def end_with_the_run() -> None:
    """Lets SIGTERM end this process as Ctrl-C does, so that no run that it started is left running."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    end_with_the_run()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="is emptied first")
    parser.add_argument("--tiny", action="store_true", help="replace both models by a random one")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    arguments = parser.parse_intermixed_args()
    overrides, folder = arguments.overrides, arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    if arguments.tiny:
        tiny_model(load_config(arguments.config, overrides).model.path, folder / "model")
        paths = [f"{name}.path={folder / 'model'}" for name in ("model", "teacher")]
        overrides = [*overrides, *paths, "model.drop_layers=[1]"]
    rows = try_faults(arguments.config, overrides, folder, arguments.only)
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
