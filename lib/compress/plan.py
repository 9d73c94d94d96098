"""What to ask of main.py, chosen by what the result is for and by the minutes that it may take.

The choices are those that kept most in the measurements of tests/bench/README.md. Nothing is
decided here that a flag of main.py does not say: `flags` returns its command line.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU, GPU, LLAMA_CPP = "cpu", "gpu", "llama.cpp"
TARGETS = (CPU, GPU, LLAMA_CPP)
LEAST_WINDOWS = 16  # of recovery: less is not worth the passes that measure it
# of calibration on a CPU, where main.py's 128 of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN = 32, 512

# costs in forward passes of one token through the model, as evaluation takes them
RECOVERY_PASSES = 5  # of a trained token: teacher 1, student 1, its way back 2, the optimizer
PRUNING_PASSES = 6  # of a calibration token: ADMM's passes and solving
ALLOCATION_WINDOWS, ALLOCATION_PASSES = 8, 4  # there and back, in float32
EVALUATIONS = 3  # of all test tokens: both models before recovery, one after


@dataclass(frozen=True)
class Budget:
    """How long a compression may take, and how fast this machine runs the dense model."""

    seconds: float  # left after the dense model was measured
    tokens_per_second: float  # in evaluation
    test_tokens: int
    nsamples: int  # calibration windows
    seqlen: int  # tokens of a window

    def recovery_tokens(self) -> int:
        """Return the tokens of recovery for which there is time, 0 where there is too little."""
        fixed = EVALUATIONS * self.test_tokens + PRUNING_PASSES * self.nsamples * self.seqlen
        fixed += ALLOCATION_PASSES * ALLOCATION_WINDOWS * self.seqlen
        passes = self.seconds * self.tokens_per_second - fixed
        windows = int(passes / RECOVERY_PASSES / self.seqlen)
        return windows * self.seqlen if windows >= LEAST_WINDOWS else 0


def windows(device: str, longest: int) -> list[str]:
    """Return main.py's flags for windows of at most `longest` tokens: on a CPU few and short."""
    if device.startswith("cuda"):
        return []
    return ["--nsamples", str(CPU_WINDOWS), "--seqlen", str(min(CPU_SEQLEN, longest))]


def flags(target: str, recovery_tokens: int) -> list[str]:
    """Return main.py's flags that say how a model is made smaller for `target`.

    A CPU takes any pattern: half of the weights wherever they cost least, packed at 8 bits, or at 4
    where a recovery trains the integers. A GPU's kernels take 2:4. llama.cpp makes no use of zeros,
    so whole neurons go instead.
    """
    chosen = ["--trim_vocabulary", "--prune_method", "admm"]
    chosen += {
        CPU: ["--sparsity_ratio", "0.5", "--allocation", "error"],
        GPU: ["--sparsity_type", "2:4"],
        LLAMA_CPP: ["--sparsity_type", "neurons", "--sparsity_ratio", "0.25"],
    }[target]
    if recovery_tokens:
        chosen += ["--recover", str(recovery_tokens)]
    packing = {
        # training on the integers gives back most of what 4 bits cost
        CPU: ["--replace_sparse_layers", "--pack_bits", "4" if recovery_tokens else "8"],
        GPU: ["--replace_sparse_layers"],
        LLAMA_CPP: [],
    }
    return chosen + packing[target]
