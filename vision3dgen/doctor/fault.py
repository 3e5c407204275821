"""A training step that ended in a number that is not finite, done again."""

from pathlib import Path

from vision3dgen import structures
from vision3dgen.doctor.finding import Finding
from vision3dgen.engine import load_fault, replay
from vision3dgen.experiment import Run

STRUCTURES = tuple(value for value in vars(structures).values() if isinstance(value, type))


def is_fault(folder: Path) -> bool:
    """Whether this is RUN/faults/step_N of a run."""
    return (folder / "step.pt").is_file()


def examine_fault(folder: Path, device: str = "cpu") -> list[Finding]:
    """Do the step of RUN/faults/step_N again, with the weights and random numbers of then."""
    fault = load_fault(folder, STRUCTURES)
    model = Run.open(folder.resolve().parents[1]).experiment.build_model()
    kept = [Finding("step", "info", f"step {fault.step}, part {fault.part!r}, in {fault.precision}: {fault.message}")]
    for number, batch in enumerate(fault.batches):
        if isinstance(batch, dict) and "id" in batch:
            kept.append(Finding("batch", "info", f"{number + 1} of {len(fault.batches)}: {', '.join(batch['id'])}"))
    found = replay(folder, model, STRUCTURES, device)
    if found is None:
        return [*kept, Finding("replay", "ok", f"all numbers are finite on {device}, as they were not in training")]
    fix = "look at the batch's items; lower the learning rate or clip the gradient; leave half precision"
    return [*kept, Finding("replay", "fail", f"the first that is not finite: {found}", fix)]
