"""The command line: parse, build, call; no logic lives here."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from vision3dgen import __version__

# Modules are imported in the functions: `vision3dgen --help` must not wait for torch.

EXIT_CODES = """exit codes: 0 done; 1 some items were rejected or failed, doctor found faults (they are listed), or
training met a number that is not finite or lost a process; 2 bad arguments, configuration or input; 128 + N stopped
by signal N after saving a checkpoint"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or not all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse does not take positional arguments on both sides of options
        options.overrides = [*options.overrides, *rest]
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"vision3dgen {options.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | ConnectionError) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vision3dgen", description="3D and generative vision research on PyTorch.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"vision3dgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "train a model", "vision3dgen train configs/X.yaml --out runs/x seed=1")
    _configured(train)
    train.add_argument("--out", type=Path, required=True, help="run folder")
    train.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint, if any")
    train.add_argument("--deterministic", action="store_true", help="refuse operations that differ from run to run")
    train.add_argument("--detect-anomaly", action="store_true", help="check every output and gradient, at a cost")

    evaluate = _command(
        commands, "evaluate", _evaluate, "score a trained run", "vision3dgen evaluate runs/x --protocol onet"
    )
    evaluate.add_argument("run_folder", type=Path, metavar="RUN")
    evaluate.add_argument("--protocol", action="append", help="name; may be repeated (default: the configuration's)")
    evaluate.add_argument("--split", help="train, val or test (default: the configuration's)")
    evaluate.add_argument("--workers", type=int, help="processes that score shapes (default: the configuration's)")
    _device(evaluate)

    reconstruct = _command(
        commands, "reconstruct", _reconstruct,
        "shapes or depth from images, or shapes from the clouds or voxels a model completes",
        "vision3dgen reconstruct runs/x chair.png --out out",
    )  # fmt: skip
    reconstruct.add_argument("run_folder", type=Path, metavar="RUN")
    reconstruct.add_argument(
        "inputs", type=Path, nargs="+", metavar="FILE", help="PNG, with alpha or on white; ply, npz or xyz; binvox"
    )
    reconstruct.add_argument("--out", type=Path, required=True, help="folder for NAME.glb and NAME.ply")
    _device(reconstruct)

    prepare = commands.add_parser("prepare", help="make a ShapeNet-style data folder")
    sources = prepare.add_subparsers(dest="source", required=True, metavar="SOURCE")
    procedural = _command(
        sources, "procedural", _prepare_procedural, "generated shapes of 13 categories",
        "vision3dgen prepare procedural data/p --shapes-per-category 20 --views 4 --seed 0",
    )  # fmt: skip
    procedural.add_argument("root", type=Path, metavar="ROOT")
    procedural.add_argument("--shapes-per-category", type=int, required=True)
    procedural.add_argument("--categories", nargs="+", help="names or synset ids (default: all 13)")
    meshes = _command(
        sources, "meshes", _prepare_meshes, "a folder of OBJ, PLY, OFF, STL or GLB files",
        "vision3dgen prepare meshes scans/ data/scans --views 8",
    )  # fmt: skip
    meshes.add_argument("source_folder", type=Path, metavar="IN")
    meshes.add_argument("root", type=Path, metavar="OUT")
    shapenet = _command(
        sources, "shapenet", _prepare_shapenet, "ShapeNetCore v1 or v2, dirty meshes included",
        "vision3dgen prepare shapenet ShapeNetCore.v2/ data/shapenet --workers 16",
    )  # fmt: skip
    shapenet.add_argument("source_folder", type=Path, metavar="IN")
    shapenet.add_argument("root", type=Path, metavar="OUT")
    shapenet.add_argument("--engine", choices=("local", "ray"), default="local", help="default: local")
    shapenet.add_argument("--address", help="of a Ray cluster, such as auto (default: a new one of this machine)")
    shapenet.add_argument("--steps", nargs="+", help="default: all but watertight")
    shapenet.add_argument("--voxels", type=int, nargs="+", default=[32], help="resolutions (default: 32)")
    shapenet.add_argument("--image-size", type=int, default=137, help="side of the pictures (default: 137)")
    shapenet.add_argument(
        "--cameras", type=Path, metavar="FILE", help="cameras.npz to draw with (default: --views by 3D-R2N2's)"
    )
    shapenet.add_argument("--resolution", type=int, help="of the step watertight, on the longest edge (default: 128)")
    shapenet.add_argument("--thickness", type=float, help="of the step watertight, for sheets (default: 0)")
    shapenet.add_argument("--distortion", type=float, help="most that the step watertight may do (default: 0.01)")
    shapenet.add_argument("--time-limit", type=float, default=600, help="seconds for each model (default: 600)")
    shapenet.add_argument("--memory-limit", type=int, default=4096, help="MiB for each model (default: 4096)")
    shapenet.add_argument("--again", action="store_true", help="try rejected models once more")
    scenes = _command(
        sources, "scenes", _prepare_scenes, "scenes of generated shapes, with captions",
        "vision3dgen prepare scenes data/scenes --scenes 2000 --seed 0",
    )  # fmt: skip
    scenes.add_argument("root", type=Path, metavar="ROOT")
    scenes.add_argument("--scenes", type=int, required=True)
    scenes.add_argument("--image-size", type=int, default=96, help="side of the pictures (default: 96)")
    scenes.add_argument("--sentences", type=int, default=10_000, help="about scenes not drawn (default: 10000)")
    scenes.add_argument("--objects", type=int, help="rooms with at most so many, for detectors, without captions")
    scenes.add_argument("--categories", nargs="+", metavar="NAME", help="of the objects of rooms (default: all 13)")
    for each in (procedural, meshes, shapenet):
        each.add_argument("--views", type=int, default=24, help="renderings per shape (default: 24)")
        each.add_argument("--points", type=int, default=100_000, help="samples per shape (default: 100000)")
    for each in (procedural, meshes, shapenet, scenes):
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--workers", type=int, default=1, help="processes; the bytes written do not depend on it")

    pack = _command(
        commands, "pack", _pack, "a folder of shapes as a packed store, read by memory map",
        "vision3dgen pack data/p data/p.store --image-size 64",
    )  # fmt: skip
    pack.add_argument("source_folder", type=Path, metavar="IN")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder of the store")
    pack.add_argument("--layout", help="of IN (default: what it looks like)")
    pack.add_argument("--fields", nargs="+", help="which to keep (default: all that the first model has)")
    pack.add_argument(
        "--manifest", help="who is in which split: a file, r2n2, onet, 'random(SEED)' (default: as IN has it)"
    )
    pack.add_argument("--image-size", type=int, help="keep pictures at this size, over white (default: as they are)")
    pack.add_argument("--skip-broken", action="store_true", help="leave broken models out, listed in OUT/rejected.json")
    pack.add_argument("--workers", type=int, default=1, help="processes; the bytes written do not depend on it")
    unpack = _command(
        commands, "unpack", _unpack, "a packed store, or any folder of shapes, in another layout",
        "vision3dgen unpack data/p.store data/onet --layout onet",
    )  # fmt: skip
    unpack.add_argument("source_folder", type=Path, metavar="IN")
    unpack.add_argument("out", type=Path, metavar="OUT", help="folder of the other layout")
    unpack.add_argument("--layout", required=True, help="of OUT: shapenet, onet, deepsdf, meshrcnn, ...")

    view = _command(commands, "view", _view, "look at the shapes of a run", "vision3dgen view runs/x --items 4")
    view.add_argument("run_folder", type=Path, metavar="RUN")
    view.add_argument("--items", type=int, default=8, help="test items to show (default: 8)")
    view.add_argument("--out", type=Path, help="where pictures go without a display (default: RUN/view)")
    _device(view)

    report = _command(
        commands, "report", _report, "one HTML page about runs: scores, curves, pictures, shapes to turn",
        "vision3dgen report runs/x runs/y --out report.html",
    )  # fmt: skip
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a folder of run folders such as a benchmark's"
    )
    report.add_argument("--out", type=Path, help="the page (default: report.html in the first RUN)")
    report.add_argument("--items", type=int, default=5, help="items drawn, spread over the split (default: 5)")
    report.add_argument("--extreme", type=int, default=1, help="worst and best ones drawn for each run (default: 1)")
    _device(report)

    sample = _command(
        commands, "sample", _sample, "draw from a trained generator", "vision3dgen sample runs/x --n 64 --out samples"
    )
    sample.add_argument("run_folder", type=Path, metavar="RUN")
    sample.add_argument("--n", type=int, default=64, help="how many (default: 64)")
    sample.add_argument("--out", type=Path, help="folder for samples.npz and samples.png (default: RUN/samples)")
    sample.add_argument("--class", type=int, nargs="+", default=[], dest="classes", help="classes, taken in turn")
    sample.add_argument("--temperature", type=float, help="below 1 for more probable samples, above 1 for more varied")
    sample.add_argument("--seed", type=int, default=0, help="default: 0")
    _device(sample)

    doctor = _command(
        commands, "doctor", _doctor, "check the machine, a data folder, an experiment, or a step that failed",
        "vision3dgen doctor configs/X.yaml --preset tiny --out runs/doctor",
    )  # fmt: skip
    doctor.add_argument(
        "subject",
        type=Path,
        nargs="?",
        metavar="CONFIG_OR_FOLDER",
        help="YAML file, data folder, or RUN/faults/step_N (default: the machine)",
    )
    _overridden(doctor)
    doctor.add_argument(
        "--steps", type=int, default=100, help="updates of overfitting and of the range test (default: 100)"
    )
    doctor.add_argument("--out", type=Path, help="folder for doctor.json, and doctor.png of an experiment")
    _device(doctor)

    convert = _command(
        commands, "convert", _convert, "published weights to a run folder, and back",
        "vision3dgen convert onet onet_pcl2mesh.pt runs/onet",
    )  # fmt: skip
    convert.add_argument("system", metavar="SYSTEM", help="whose network: onet, convonet, ...")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a torch or safetensors file")
    convert.add_argument("out", type=Path, metavar="OUT", help="run folder to write")
    convert.add_argument(
        "--back", action="store_true", help="CHECKPOINT is a run folder or its safetensors file, OUT a torch file"
    )

    share = _command(
        commands, "share", _share, "a trained run as a folder to share: weights, configuration, card",
        "vision3dgen share runs/x shared/x --push me/occupancy-chairs",
    )  # fmt: skip
    share.add_argument("run_folder", type=Path, metavar="RUN")
    share.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    share.add_argument("--title", default="", help="of the card (default: the run's name)")
    share.add_argument("--license", default="", help="of the weights, such as cc-by-4.0 (default: left open)")
    share.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub too, as a private model")

    sweep = _command(
        commands, "sweep", _sweep, "search hyper-parameters: many runs, a table and a picture",
        "vision3dgen sweep configs/X.yaml --space space.yaml --trials 20 --out runs/sweep",
    )  # fmt: skip
    _configured(sweep)
    sweep.add_argument("--space", type=Path, required=True, help="YAML file: dotted keys and what values they may take")
    sweep.add_argument("--trials", type=int, help="how many (a grid has as many as it has combinations)")
    sweep.add_argument("--search", default="random", help="random, grid or halving (default: random)")
    sweep.add_argument("--metric", help="key of metrics.jsonl (default: val/ and trainer.validation.metric)")
    sweep.add_argument("--mode", help="max or min (default: trainer.validation.mode)")
    sweep.add_argument("--out", type=Path, required=True, help="folder of the sweep; the same command goes on with it")
    sweep.add_argument("--seed", type=int, default=0, help="of the values drawn, not of the runs (default: 0)")
    sweep.add_argument("--address", help="of a Ray cluster (default: this machine alone)")
    sweep.add_argument(
        "--cpus-per-trial", type=float, default=1, help="how many trials run at once follows (default: 1)"
    )
    sweep.add_argument("--gpus-per-trial", type=float, help="may be a fraction (default: 1 if there is one)")

    completion = _command(
        commands, "completion", _completion, "a script that lets the Tab key complete commands and options",
        'eval "$(vision3dgen completion bash)"',
    )  # fmt: skip
    completion.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: {example}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    _overridden(parser)


def _overridden(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--preset", help="a named set of overrides in the file, such as tiny")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")


def _chosen(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _train(options: argparse.Namespace) -> int:
    from vision3dgen.config import load
    from vision3dgen.engine import deterministic
    from vision3dgen.experiment import Run

    run = Run.create(options.out, load(options.config, options.overrides, preset=options.preset))
    run.experiment.prepare_data()
    with deterministic() if options.deterministic else nullcontext():
        result = run.train(resume=options.resume, detect_anomaly=options.detect_anomaly)
    print(f"trained {result.step} steps; weights in {result.checkpoint}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from vision3dgen.engine.processes import processes
    from vision3dgen.experiment import Run

    run = Run.open(options.run_folder)
    failed = 0
    for name in options.protocol or run.experiment.evaluation.names:
        device = _chosen(options.device)
        scores = run.evaluate(name, split=options.split, device=device, workers=options.workers)
        if processes().is_main_process:
            print(scores.to_markdown())
        failed += scores.to_dict().get("n_failed", 0)
    return 1 if failed else 0


def _reconstruct(options: argparse.Namespace) -> int:
    from vision3dgen.experiment import Run

    written = Run.open(options.run_folder).reconstruct(options.inputs, options.out, device=_chosen(options.device))
    for path in written:
        print(path)
    return 0


def _prepare_procedural(options: argparse.Namespace) -> int:
    from vision3dgen.datasets import prepare_procedural

    done = prepare_procedural(
        options.root,
        shapes_per_category=options.shapes_per_category,
        categories=options.categories,
        views=options.views,
        points=options.points,
        seed=options.seed,
        workers=options.workers,
    )
    print(done)
    return 0


def _prepare_meshes(options: argparse.Namespace) -> int:
    from vision3dgen.datasets import prepare_meshes

    done = prepare_meshes(
        options.source_folder,
        options.root,
        views=options.views,
        points=options.points,
        seed=options.seed,
        workers=options.workers,
    )
    print(done)
    return 1 if done.rejected else 0


def _prepare_shapenet(options: argparse.Namespace) -> int:
    from vision3dgen.datasets import Limits, Settings, Watertight, load_cameras, prepare_shapenet
    from vision3dgen.parallel import Local, Ray

    given = {"resolution": options.resolution, "thickness": options.thickness, "most": options.distortion}
    settings = Settings(
        options.seed,
        options.views,
        options.points,
        options.image_size,
        resolutions=tuple(options.voxels),
        watertight=Watertight(**{name: value for name, value in given.items() if value is not None}),
    )
    if options.steps:
        settings = replace(settings, steps=tuple(options.steps))
    if "watertight" not in settings.steps:
        for name, option in (("resolution", "--resolution"), ("thickness", "--thickness"), ("most", "--distortion")):
            if given[name] is not None:
                raise ValueError(f"{option} is of the step watertight, which is not among the steps: see --steps")
    done = prepare_shapenet(
        options.source_folder,
        options.root,
        settings,
        engine=Ray(options.address, options.workers) if options.engine == "ray" else Local(options.workers),
        limits=Limits(options.time_limit, options.memory_limit),
        cameras=None if options.cameras is None else load_cameras(options.cameras, options.image_size),
        again=options.again,
    )
    print(done)
    return 1 if done.rejected else 0


def _prepare_scenes(options: argparse.Namespace) -> int:
    from vision3dgen.datasets import prepare_scenes

    done = prepare_scenes(
        options.root,
        scenes=options.scenes,
        image_size=options.image_size,
        sentences=options.sentences,
        objects=options.objects,
        categories=options.categories,
        seed=options.seed,
        workers=options.workers,
    )
    print(done)
    return 0


def _pack(options: argparse.Namespace) -> int:
    from vision3dgen.datasets import pack

    done = pack(
        options.source_folder,
        options.out,
        layout=options.layout,
        fields=options.fields,
        manifest=options.manifest,
        image_size=options.image_size,
        on_error="skip" if options.skip_broken else "raise",
        workers=options.workers,
    )
    print(done)
    return 1 if done.rejected else 0


def _unpack(options: argparse.Namespace) -> int:
    from vision3dgen.datasets import unpack

    print(unpack(options.source_folder, options.out, options.layout))
    return 0


def _view(options: argparse.Namespace) -> int:
    from vision3dgen.experiment import Run

    shown = Run.open(options.run_folder).view(
        options.items, options.out or options.run_folder / "view", device=_chosen(options.device)
    )
    print(shown)
    return 0


def _report(options: argparse.Namespace) -> int:
    from vision3dgen.report import write_report

    path = write_report(
        options.runs,
        options.out or options.runs[0] / "report.html",
        items=options.items,
        extreme=options.extreme,
        device=_chosen(options.device),
    )
    print(path)
    return 0


def _sample(options: argparse.Namespace) -> int:
    from vision3dgen.experiment import Run

    written = Run.open(options.run_folder).sample(
        options.n,
        options.out or options.run_folder / "samples",
        classes=options.classes,
        temperature=options.temperature,
        seed=options.seed,
        device=_chosen(options.device),
    )
    for path in written:
        print(path)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from vision3dgen import doctor
    from vision3dgen.config import construct, load
    from vision3dgen.experiment import Experiment

    if options.subject is None:
        findings = doctor.examine_environment()
    elif doctor.is_fault(options.subject):
        findings = doctor.examine_fault(options.subject, str(_chosen(options.device)))
    elif options.subject.is_dir():
        findings = doctor.examine_folder(options.subject)
    else:
        experiment = construct(Experiment, load(options.subject, options.overrides, preset=options.preset))
        experiment.check()
        findings = doctor.examine_experiment(experiment, options.out, device=options.device, steps=options.steps)
    doctor.print_findings(findings)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        doctor.write_findings(findings, options.out / "doctor.json")
    return 0 if doctor.is_sound(findings) else 1


def _convert(options: argparse.Namespace) -> int:
    from vision3dgen import convert

    there = convert.convert_back if options.back else convert.convert
    conversion = there(options.system, options.checkpoint)
    print(conversion.to_text())
    if not conversion.is_whole:
        print(f"{options.checkpoint} does not fit, nothing is written", file=sys.stderr)
        return 1
    write: Any = convert.write_published if options.back else convert.write_run
    write(conversion, options.out)
    print(f"written to {options.out}")
    return 0


def _share(options: argparse.Namespace) -> int:
    from vision3dgen import pretrained

    print(pretrained.save_pretrained(options.run_folder, options.folder, title=options.title, license=options.license))
    if options.push:
        print(pretrained.push_to_hub(options.folder, options.push))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from vision3dgen.sweep import Source, Sweep

    sweep = Sweep.create(
        options.out,
        Source(options.config, options.overrides, options.preset),
        options.space,
        trials=options.trials,
        search=options.search,
        metric=options.metric,
        mode=options.mode,
        seed=options.seed,
    )
    trials = sweep.run(address=options.address, cpus=options.cpus_per_trial, gpus=options.gpus_per_trial)
    print((options.out / "table.md").read_text(encoding="utf-8"), end="")
    waiting = sum(trial.status == "waiting" for trial in trials)
    if waiting:
        print(f"{waiting} trials have not run: the same command goes on with them")
    return 1 if waiting or any(trial.status == "failed" for trial in trials) else 0


def _completion(options: argparse.Namespace) -> int:
    from vision3dgen.completion import script

    print(script(_parser(), options.shell), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
