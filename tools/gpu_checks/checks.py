"""The table of checks, the most telling first, so that a run that is cut off has told most. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A check: the function `place`, "module:function", of this package, which receives a `Task`.

    `seconds`: its limit. `proves`: whether it says that something is right; the others only measure, and cannot fail
    the whole. `needs_gpu`: why it means nothing on a CPU; empty if it does mean something.
    """

    name: str
    place: str
    seconds: float
    what: str
    proves: bool = True
    needs_gpu: str = ""


CHECKS = (
    Check("machine", "machine:describe", 40, "versions, bytes copied and bfloat16 operations a second", proves=False),
    Check("loss_errors", "losses:errors", 75, "losses and statistics against float64, every set of kernels"),
    Check("nccl", "nccl:two_ranks", 45, "two ranks on one GPU: refused, then taken for two hosts"),
    Check("loss_speeds", "losses:speeds", 45, "seconds, peak and host waits at Qwen3's shapes", proves=False),
    Check("train_step", "train_step:layouts", 80, "a step at tp 2, pp 2 and dp 2 against one process and float64"),
    Check("model", "model:against_transformers", 75, "four layers of Qwen3-4B: logits and gradients"),
    Check("resumes", "resumes:equal", 60, "two resumes and the run that went straight on are equal bit for bit"),
    Check("gpu_tests", "gpu_tests:run", 120, "the tests with the marker gpu", needs_gpu="each of them needs a GPU"),
    Check("loss_peers", "losses:peers", 60, "the JSD beside Liger's and plain chunked torch", proves=False),
    Check("loss_chunks", "losses:chunk_sizes", 30, "chunk sizes", proves=False),
    Check("waiting", "waiting:decode_beside", 85, "decoding beside a rank that waits in gloo, in NCCL", proves=False),
    Check("dead_peer", "dead_peer:end_group", 70, "abort and destroy of a group whose peer has died", proves=False),
    Check("checkpoint", "checkpoint:peak", 60, "memory and seconds of a checkpoint", proves=False),
    Check("widths", "widths:new_and_rounded", 60, "recompiles and plans over new widths", proves=False),
    Check(
        "loss_compiled",
        "losses:compiled",
        75,
        "the kernels of torch.compile",
        proves=False,
        needs_gpu="a CPU compiles C++ for a minute",
    ),
)
