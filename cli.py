# SPDX-License-Identifier: MIT
"""What the commands maml.py and rl.py share: settings, files, a run, workers, the report.

It knows algorithms by name alone. What it runs is an experiment, whose contract `maml.Experiment` states;
what the module of a command must have, `main` states.
"""

import argparse
import csv
import ctypes
import datetime
import io
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from textwrap import fill
from typing import NamedTuple

import numpy as np

import tasks
from tasks import tell

# Settings ---------------------------------------------------------------------------------------

COMMANDS = {
    "maml.py": ("sinusoid", "omniglot", "miniimagenet"),
    "rl.py": ("navigation", "cheetah-vel", "cheetah-dir", "ant-vel", "ant-dir"),
}
UNTRAINED = ("random", "nearest")
FLOATS = ("float32", "float64")


class Unusable(Exception):
    """Bad usage or input: its message is one line for the user; exit code 2."""


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message):
        raise Unusable(" ".join(message.split()))


def checked(kind, sound, name):
    """A flag's kind: what `kind` makes of a text, where it is `sound`; errors call it `name`."""

    def parse(text):
        value = kind(text)
        if not sound(value):
            raise ValueError
        return value

    parse.__name__ = name
    return parse


count = checked(int, lambda n: 1 <= n < 2**31, "count (1 to 2147483647)")
several = checked(int, lambda n: 2 <= n < 2**31, "count (2 to 2147483647)")
whole = checked(int, lambda n: n >= 0, "whole number (0 or more)")
rate = checked(float, lambda x: 0 <= x < np.inf, "rate (finite, 0 or more)")
nonempty = checked(str, bool, "text (not empty)")  # an unset variable of a shell is empty


class Setting(NamedTuple):
    """A row of a table of settings: --name, what it takes, each task's default (None: it has none), meaning.

    `kind` makes a value of a text, or is a tuple of choices. A default that names a row above is its value.
    """

    name: str
    kind: object
    defaults: dict
    meaning: str

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    def text(self, task):
        """The task's default, as the flag takes it."""
        return " ".join(map(str, np.atleast_1d(self.defaults[task])))

    def shown(self):
        """The default as --help has it, or each task's where they differ."""
        texts = {task: self.text(task) for task, value in self.defaults.items() if value is not None}
        if len(set(texts.values())) == 1:
            return next(iter(texts.values()))
        return ", ".join(f"{task} {text}" for task, text in texts.items())


def table_of(tasks, *rows):
    """Rows (name, kind, a default for each task ..., meaning) as `Setting`s."""
    return [Setting(name, kind, dict(zip(tasks, values)), meaning) for name, kind, *values, meaning in rows]


def settings_of(args, module):
    """What a checkpoint keeps, from the flags and the task's defaults."""
    if args.task is None:
        raise Unusable(f"--task is missing; name one of {', '.join(module.TASKS)}")
    named = {"task": args.task, "method": args.method or "maml"}
    return named | settled(module.SETTINGS, args, named, **module.conditional_defaults(args, **named))


def settled(rows, args, known, **defaults):
    """{name: value} of what the known task has: the flag's, or that of `defaults`, or the table's."""
    values, task = {}, known["task"]
    for row in rows:
        given, default = getattr(args, row.name), defaults.get(row.name, row.defaults[task])
        if default is not None:
            default = (known | values).get(default, default)
            values[row.name] = default if given is None else given
        elif given is not None:
            others = ", ".join(other for other, value in row.defaults.items() if value is not None)
            raise Unusable(f"{row.flag} is for --task {others}, and {task} has none; leave it out")
    return values


def task_name(prog, text):
    """A flag's value as the name of a task, where it is not the other command's."""
    for other, known in COMMANDS.items():
        if other != prog and text in known:
            raise Unusable(f"{text} is a task of {other}: give these flags to python {other}")
    return text


def parser_of(module, what, first_order, workers):
    """The parser of `module`'s command: a flag for each row of its tables, and those that all have."""
    prog = f"{module.__name__}.py"
    text = f"{what}: meta-trains, then evaluates on unseen tasks."
    parser = Parser(prog=prog, allow_abbrev=False, description=text)
    kind = partial(task_name, prog)
    parser.add_argument("--task", type=kind, choices=COMMANDS[prog], help="the task distribution p(T)")
    which, who = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    which.add_argument("--method", choices=module.METHODS, help="what is learned, and how (default: maml)")
    text = "in place of a method: what the paper compares with"
    which.add_argument("--baseline", dest="method", choices=module.BASELINES, help=text)
    short = first_order["dest"]  # for what --first-order is short, and does not go with it
    groups = {short: which if short == "method" else parser.add_mutually_exclusive_group()}
    groups[short].add_argument("--first-order", action="store_const", **first_order)
    for row in module.SETTINGS + module.EVALUATION:
        kind = {"type": row.kind, "metavar": "N" if row.kind in (count, several, whole) else "X"}
        if isinstance(row.kind, tuple):
            kind = {"type": type(row.kind[0]), "choices": row.kind}
        if any(isinstance(value, tuple) for value in row.defaults.values()):
            kind |= {"nargs": "+", "action": "extend"}
        home = groups.get(row.name, parser)
        home.add_argument(row.flag, help=f"{row.meaning} (default: {row.shown()})", **kind)
    some = checked(int, lambda n: 1 <= n <= 1024, "count (1 to 1024)")
    who.add_argument("--workers", type=some, metavar="N", help=f"processes that {workers}")
    text = "Dask scheduler whose workers do that, e.g. tcp://10.0.0.1:8786 (needs dask[distributed])"
    who.add_argument("--scheduler", type=nonempty, metavar="ADDRESS", help=text)
    experiment = module.Experiment
    saved, logged = experiment.save_every, experiment.log_every
    files = {
        "save": f"checkpoint, at least every {saved} meta-iterations, on Ctrl-C and at the end",
        "resume": "go on, with the same --data bit for bit as an unbroken run; saves here, or to --save",
        "log": f"learning curve, every {logged} meta-iterations: {', '.join(experiment.columns)}",
        "results": "the final table, as CSV",
        "plot": "picture of some test tasks, and the curve against gradient steps (needs matplotlib)",
    }
    kinds = {"log": "csv", "results": "csv", "plot": "png"}
    for flag, text in files.items():
        parser.add_argument(f"--{flag}", type=nonempty, metavar=f"FILE.{kinds.get(flag, 'npz')}", help=text)
    text = "train nothing, evaluate these checkpoints; --alpha may differ (but for Meta-SGD)"
    parser.add_argument(
        "--evaluate", type=nonempty, metavar="FILE.npz", nargs="+", action="extend", help=text
    )
    parser.set_defaults(data=None, adapt=None)  # which one command has alone
    return parser


# Files ------------------------------------------------------------------------------------------


class Best(NamedTuple):
    """What was best on validation: its score, larger is better, its parameters and its iteration."""

    score: float
    theta: np.ndarray
    iteration: int


def writing(path):
    """A binary file to write, which becomes `path`, by a link or not, as `tasks.replacing` says."""
    return tasks.replacing(os.path.realpath(path))


def lines_of(rows):
    """Rows as bytes of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def check_outputs(args, columns):
    """Unusable where the run could not write a file, or would replace one not its own (but for a picture)."""
    ours = {"log": (",".join(["iteration", *columns]), not args.resume), "results": ("task,method,", False)}
    own, save = ("save", args.save) if args.save else ("resume", args.resume)
    files = [(own, save), (own, save and best_of(save))]
    files += [(flag, getattr(args, flag)) for flag in ("log", "results", "plot")]
    read = [("evaluate", path) for path in args.evaluate or ()]
    if save and os.path.realpath(save) != os.path.realpath(args.resume or ""):
        read.append(("resume", args.resume))
        for found in (save, best_of(save)):
            if os.path.isfile(found):
                hint = f"go on from it with --resume {shlex.quote(save)}, or remove it"
                raise Unusable(f"--save {save}: there is a file {found}; {hint}")
    names = {}
    for flag, path in files + read:
        if path and names.setdefault(os.path.realpath(path), flag) != flag:
            raise Unusable(f"--{names[os.path.realpath(path)]} and --{flag} are both {path}; name two files")
    for flag, path in files:
        if path:
            check_writable(f"--{flag}", path, *ours.get(flag, ()))


def check_writable(flag, path, head=None, alone=False):
    """Unusable unless a file can be made at `path`, where there is none or one of ours.

    It is ours where it begins with `head`, and, if that is to stand `alone`, has no further line.
    """
    try:
        if os.path.isdir(path) or path.endswith(os.sep):
            raise IsADirectoryError(21, "is a folder")
        if os.path.isfile(path):
            with open(path, "a+", errors="replace") as file:  # a log is appended to
                file.seek(0)
                if head and (not file.readline(999).startswith(head) or alone and file.readline(999)):
                    raise Unusable(f"{flag} {path}: not the file of this run; name another, or remove it")
        elif os.path.exists(path):
            raise FileExistsError(17, "is no regular file")
        with suppress(LookupError), writing(path):
            raise LookupError  # tried, and given up: root may write where no flag says so
    except OSError as error:
        hint = "name a file in a writable folder"
        raise Unusable(f"{flag} {path}: cannot write there ({error.strerror}); {hint}")


def save_checkpoint(path, settings, state, best, final, rng):
    """An .npz of `state`, `best`, the generator's state and the settings, the last two as bytes of JSON.

    Beside it, in FILE.best.npz, what is to be evaluated where validation has selected it, `final`.
    """
    if final.score > -np.inf:
        save_weights(best_of(path), settings, final.theta, final.iteration)
    values = {"settings": settings, "rng": rng.bit_generator.state}
    texts = {name: json.dumps(value).encode() for name, value in values.items()}
    with writing(path) as file:
        np.savez(file, **arrays_of(state, best), **texts)


def save_weights(path, settings, theta, iteration):
    """What evaluation needs of a checkpoint, as an .npz: nothing to go on from."""
    with writing(path) as file:
        np.savez(file, theta=theta, iteration=iteration, settings=json.dumps(settings).encode())


def arrays_of(state, best):
    """{name: value} of what a checkpoint holds of them."""
    return state._asdict() | {f"best_{name}": value for name, value in best._asdict().items()}


def load_checkpoint(path, module):
    """-> settings, State, Best, Generator; the last two None of a file of weights, and State's moments.

    Nothing is unpickled. Unusable where it is no whole checkpoint of the command that `module` is.
    """
    try:
        if os.path.exists(path) and not (os.path.isfile(path) and zipfile.is_zipfile(path)):
            raise ValueError("it is no .npz file")
        with np.load(path, allow_pickle=False) as members:
            if sum(member.file_size for member in members.zip.infolist()) > os.path.getsize(path):
                raise ValueError("it is compressed, and --save compresses nothing")
            arrays = dict(members)
        settings = json.loads(arrays.pop("settings").item())
        expected = settings_of(module.build_parser().parse_args(words_of(settings, module)), module)
        if expected != settings:
            raise ValueError(f"it has {', '.join(settings)}, where {', '.join(expected)} are expected")
        return settings, *unpacked(arrays, module.experiment_of(settings).start())
    except FileNotFoundError:
        raise Unusable(f"{path}: there is no such file; name a checkpoint that --save wrote")
    except Exception as error:  # whatever the bytes hold
        reason = tasks.one_line(error)
        what = f"not a whole checkpoint of {module.__name__}.py ({reason})"
        raise Unusable(f"{path}: {what}; name a file that its --save wrote")


def unpacked(arrays, start):
    """A checkpoint's arrays -> State, Best, Generator, which must be shaped as `start` is."""
    rng, expected = arrays.pop("rng", None), arrays_of(start, Best(0.0, start.theta, 0))
    if rng is None:
        expected = {name: expected[name] for name in ("theta", "iteration")}
    if arrays.keys() != expected.keys():
        raise ValueError(f"it holds {', '.join(arrays)}, where {', '.join(expected)} are expected")
    for name, wanted in expected.items():
        found, wanted = arrays[name], np.asarray(wanted)
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"{name} is {found.dtype} {found.shape}; expected {wanted.dtype} {wanted.shape}")
    values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    if values["iteration"] < 0:
        raise ValueError(f"its iteration is {values['iteration']}")
    state = start._replace(**{name: values.get(name) for name in start._fields})
    if rng is None:
        return state, None, None
    generator = np.random.default_rng(0)
    generator.bit_generator.state = json.loads(rng.item())
    return state, Best(*(values[f"best_{name}"] for name in Best._fields)), generator


def words_of(settings, module):
    """The words of a command line that has these settings."""
    kind = "baseline" if settings["method"] in module.BASELINES else "method"
    flags = {kind if key == "method" else key.replace("_", "-"): value for key, value in settings.items()}
    return [f"--{flag}={value}" for flag, value in flags.items()]


def begin_log(path, columns, iteration, every):
    """The learning curve as CSV: its head, and what it has of an earlier part of the run, to `iteration`.

    Those rows are kept that the unbroken run has: one every `every` iterations.
    """
    head, rows = ["iteration", *columns], []
    if os.path.exists(path):
        sound = re.compile(r"\d+(,[-+.\deinfa]+)+,?\n")  # none torn by a full disk; validation may be empty
        with open(path, errors="replace") as file:
            lines = [line[:-1].split(",") for line in file if sound.fullmatch(line)]
        due = {str(i) for i in range(every, iteration + 1, every)}
        rows = [row for row in lines if len(row) == len(head) and row[0] in due]
    with writing(path) as file:
        file.write(lines_of([head, *rows]))


# A run ------------------------------------------------------------------------------------------


def main(module, argv=None):
    """Runs the command line (None: the process's) that `module`, maml or rl, describes: -> exit code.

    The module has build_parser(); TASKS, METHODS and BASELINES; SETTINGS and EVALUATION, the tables of what a
    checkpoint keeps and an evaluation may be asked; conditional_defaults(args, task, method) of SETTINGS;
    OUTER, the one that is the outer step size; Experiment, whose contract `maml.Experiment` states, and
    experiment_of(settings), which makes one; train, the loop of meta-iterations; plot(models, curves, log);
    and classify(models, args), where its parser has --adapt.
    """
    one_blas_thread()
    with ExitStack() as ending:  # waits for the workers' last parcels when all has been said
        code = guarded(f"{module.__name__}.py", lambda: run(argv, module, ending))
        if argv is None:  # the process ends, and Ctrl-C may end this wait
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def guarded(name, function):
    """function() as a command: -> exit code. What ends it early is one line on stderr."""
    for stream in ("stdout", "stderr"):  # closed, or without some character: no reason to stop
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
        if hasattr(getattr(sys, stream), "reconfigure"):
            getattr(sys, stream).reconfigure(errors="replace")
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said is the command's own lines
            function()
        return 0
    except Unusable as error:
        code, text = 2, error
    except (FloatingPointError, OSError) as error:
        code, text = 1, error
    except BrokenExecutor:
        code, text = 1, "a worker was lost"
    except MemoryError as error:
        code, text = 1, f"out of memory; lower --meta-batch, or another size that was asked for ({error})"
    except KeyboardInterrupt as error:
        code, text = 130, str(error) or "interrupted"
    tell(f"{name}: {' '.join(str(text).splitlines())}")
    return code


def run(argv, module, ending):
    """Trains, or loads what was trained, and reports. What can be wrong is found out first."""
    args = module.build_parser().parse_args(argv)
    if args.adapt and not args.evaluate:
        raise Unusable("--adapt needs a trained model: name it with --evaluate")
    runs = [evaluated(path, args, module) for path in args.evaluate or ()] or [started(args, module)]
    if args.adapt:
        return module.classify(runs, args)
    experiments = [experiment for experiment, *_ in runs]
    check_outputs(args, experiments[0].columns)
    if args.plot:
        check_picture("--plot", args.plot)
        if len({experiment.picture for experiment in experiments}) > 1:
            raise Unusable("--plot draws checkpoints of one kind of task; leave the others out of --evaluate")
    unspread = [e.settings["task"] for e in experiments if not e.spreads]
    if unspread and (args.workers or args.scheduler):
        raise Unusable(f"{unspread[0]} has nothing to spread; leave out --workers, --scheduler")
    map = map_of(args, module, ending)
    for experiment in experiments:
        experiment.open(args.data, settled(module.EVALUATION, args, experiment.settings))
        experiment.map = map or experiment.map
    models = runs if args.evaluate else [(experiments[0], meta_train(*runs[0], args, module))]
    try:
        report(models, args, module)
    except KeyboardInterrupt:
        kept = args.evaluate or args.save or args.resume
        hint = "--evaluate makes the table and the picture again" if kept else "the model is not kept"
        raise KeyboardInterrupt(f"interrupted: {hint}")


def evaluated(path, args, module):
    """A checkpoint to evaluate -> its experiment, and what was learned."""
    for flag in ("resume", "save", "log", "iterations"):
        if getattr(args, flag):
            hint = "leave one of them out"
            raise Unusable(f"--evaluate trains nothing, so --{flag} does not go with it; {hint}")
    settings, state, *_ = load_checkpoint(path, module)
    reconcile(args, settings, path, module, free=() if settings["method"] == "meta-sgd" else ("alpha",))
    settings["iterations"] = state.iteration  # of a stopped run, or the best, not those asked for
    return module.experiment_of(settings), state.theta


def started(args, module):
    """A run from its start, or from --resume -> its experiment, State, Best and Generator.

    Its length and its outer step size may change on the way.
    """
    if not args.resume:
        experiment = module.experiment_of(settings_of(args, module))
        state = experiment.start()
        return experiment, state, Best(-np.inf, state.theta, 0), experiment.stream("training")
    settings, state, best, rng = load_checkpoint(args.resume, module)
    if rng is None:
        raise Unusable(f"{args.resume} holds weights alone, to --evaluate; resume the checkpoint beside it")
    reconcile(args, settings, args.resume, module, free=("iterations", module.OUTER))
    if settings["iterations"] <= state.iteration:
        raise Unusable(f"{args.resume} is at iteration {state.iteration}; give --iterations above that")
    return module.experiment_of(settings), state, best, rng


def reconcile(args, settings, path, module, free):
    """Flags for settings in `free` replace them; Unusable where another contradicts the checkpoint."""
    settled(module.SETTINGS, args, settings)  # Unusable where its task has no such setting
    for key, kept in settings.items():
        given = getattr(args, key)
        if given not in (None, kept) and key not in free:
            flag = key.replace("_", "-")
            again = args.evaluate and hasattr(args, f"eval_{key}")
            hint = f"give --eval-{flag}" if again else "leave the flag out"
            raise Unusable(f"{path} was trained with {flag} {kept}, not {given}; {hint}")
        settings[key] = kept if given is None else given


def meta_train(experiment, state, best, rng, args, module):
    """`train` with checkpoints, learning curve, progress and Ctrl-C: -> what was learned.

    Where validation selects, that is what was best on it.
    """
    save, final, iterations = args.save or args.resume, best, iterations_of(experiment.settings)
    if args.log:
        begin_log(args.log, experiment.columns, state.iteration, experiment.log_every)
    progress = Progress(state.iteration, iterations, experiment.watched, experiment.smoothed)
    with interruptible(module) as asked, hinting(module, save), progress:
        if save:  # at once, so that a run begun later finds this name taken
            save_checkpoint(save, experiment.settings, state, best, final, rng)
        run = module.train(experiment.step, state, rng, iterations, experiment.map)
        for state, outcome in run:
            i, stopping = state.iteration, asked.is_set()  # read once: it may change below
            last = i == iterations
            if i % experiment.log_every == 0 or last:
                row, progress.text, best, final = measured(experiment, state, outcome, last, best)
                if args.log:
                    with open(args.log, "ab", buffering=0) as file:  # in one write, so that no row is torn
                        file.write(lines_of([(i, *row)]))
            if save and (i % experiment.save_every == 0 or last or stopping or final.iteration == i):
                save_checkpoint(save, experiment.settings, state, best, final, rng)
            progress.show(i, outcome)
            if stopping or last and asked.is_set():
                hint = "nothing was saved (no --save)"
                if save:
                    model = best_of(save) if last and final.score > -np.inf else save
                    hint = f"saved; {way_on(args, module, model, last)}"
                raise KeyboardInterrupt(f"interrupted at iteration {i}: {hint}")
    if save:
        which = f"; {best_of(save)}: the best on validation, of iteration {final.iteration}"
        further = ", or --resume it with more --iterations" if iterations else ""
        tell(f"{save}: kept, --evaluate it{further}{which if final.score > -np.inf else ''}")
    elif iterations:
        tell("the model is not kept: --save FILE.npz keeps it")
    learned = final if final.score > -np.inf else state
    experiment.settings["iterations"] = learned.iteration  # of the best, not of the run
    return learned.theta


@contextmanager
def hinting(module, save):
    """A run's errors, with what to lower, and which checkpoint is kept."""
    try:
        yield
    except (FloatingPointError, OSError, BrokenExecutor) as error:
        if isinstance(error, BrokenExecutor):
            error = OSError("a worker was lost")
        hint, how = "", "--resume it"
        if isinstance(error, FloatingPointError):  # at its rates it would diverge again
            lower = "--" + module.OUTER.replace("_", "-")
            hint, how = f": lower --alpha or {lower}", f"--evaluate it, or --resume it with a lower {lower}"
        kept = f"; {save} holds the last checkpoint, {how}" if save and os.path.exists(save) else ""
        raise type(error)(f"{error}{hint}{kept}") from None


def way_on(args, module, model, last):
    """The flags that go on with a run that was interrupted, with those which no checkpoint has."""
    again = {"evaluate": model} if last else {"resume": model, "log": args.log}
    names = ["data", "results", "plot", "workers", "scheduler", *(row.name for row in module.EVALUATION)]
    words = []
    for name, value in (again | {name: getattr(args, name) for name in names}).items():
        if value is not None:
            values = map(str, np.atleast_1d(value))
            words += ["--" + name.replace("_", "-"), *("./" * text.startswith("-") + text for text in values)]
    return f"go on with {shlex.join(words)}"


def measured(experiment, state, outcome, last, best):
    """A row of the log, a line of progress, and what is best on validation: of the run, and up to its end.

    A score taken at an early end counts for this end alone, so that a resumed run is the unbroken one.
    """
    row, text, score = experiment.measure(state, outcome)
    due = state.iteration % experiment.log_every == 0 and score is not None
    if last and experiment.keeps_best and score is None:
        score = experiment.score(state.theta)
    final = best
    if score is not None and score > best.score:
        final = Best(score, state.theta, state.iteration)
    return row, text, final if due else best, final


def best_of(save):
    """Where what is best on validation is kept: FILE.best.npz beside FILE.npz."""
    root, suffix = os.path.splitext(save)
    return f"{root}.best{suffix}"


def iterations_of(settings):
    """Meta-iterations that a run of these settings takes."""
    return 0 if settings["method"] in UNTRAINED else settings["iterations"]


@contextmanager
def interruptible(module):
    """An event that Ctrl-C sets; the second one interrupts as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python takes no handler
        yield asked
        return

    def ask(*_):
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tell(f"\n{module.__name__}.py: stops after this meta-iteration; Ctrl-C again stops it now")

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


class Progress(AbstractContextManager):
    """One updating line on a terminal's stderr; elsewhere a plain line every ten seconds."""

    def __init__(self, done, of, watched, smoothed, unit="iteration"):
        self.first, self.of, self.watched, self.smoothed, self.unit = done, of, watched, smoothed, unit
        self.text, self.shown, self.smooth = "", None, 0
        self.terminal, self.began = sys.stderr.isatty(), time.monotonic()

    def show(self, done, outcome):
        """`outcome`, or its second number, is shown as a mean, over some `smoothed` at most."""
        value, now = outcome[1] if isinstance(outcome, tuple) else outcome, time.monotonic()
        self.smooth += (value - self.smooth) / min(done - self.first, self.smoothed)
        if done < self.of and now - (self.shown or self.began) < (0.2 if self.terminal else 10):
            return
        self.shown = now
        speed = (done - self.first) / max(now - self.began, 1e-9)
        pace = f"{speed:.4g} {self.unit}s/s" if speed > 1 else f"{1 / speed:.3g} s/{self.unit}"
        left = datetime.timedelta(seconds=round((self.of - done) / speed))
        line = f"{done}/{self.of}  {self.watched} {self.smooth:.3f}  {pace}  {left} left  {self.text}"
        if self.terminal:
            columns = 0
            with suppress(OSError):  # a terminal that hung up; what is printed is dropped then
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
            tell(f"\r{line[: (columns or 80) - 1]}\033[K", end="")
        else:
            tell(line)

    def __exit__(self, *_):
        if self.terminal and self.shown is not None:
            tell("")


# Workers ----------------------------------------------------------------------------------------

NO_PROCESSES = OSError, NotImplementedError  # without semaphores, as where /dev/shm is not writable


def map_of(args, module, ending):
    """The map that --workers or --scheduler asks for, or None. `ending` waits until its workers are closed.

    Where the process's end did, Python might write to their pipe while that was being closed.
    """
    if args.workers:
        try:
            pool = process_pool(args.workers)
        except NO_PROCESSES as error:
            raise Unusable(f"--workers: none can be had here ({error}); leave it out") from None
        ending.callback(pool.shutdown, cancel_futures=True)
        return partial(pool_map, pool)
    if args.scheduler:
        client = ending.enter_context(dask_client(args.scheduler, module))
        if not client.nthreads():
            hint = f"start one with dask worker {args.scheduler}"
            raise Unusable(f"--scheduler {args.scheduler}: it has no workers; {hint}")
        return partial(_dask_map, client)


def counting(map, watched, function, *columns):
    """`map`, which shows how many of its results are there, and the mean over them of their last row's."""
    with Progress(0, len(columns[0]), watched, len(columns[0]), "parcel") as progress:
        for done, result in enumerate(map(function, *columns), 1):
            progress.show(done, np.mean(result[-1]))
            yield result


@cache
def threads():
    """map on a thread for each core; what runs there must not wait for it in turn."""
    return ThreadPoolExecutor(cores(), initializer=partial(np.seterr, all="ignore")).map


@cache
def processes():
    """map on a process for each core, where there are several: threads would wait for Python's lock."""
    with suppress(*NO_PROCESSES):
        return partial(pool_map, process_pool(cores())) if cores() > 1 else map
    return map


os.register_at_fork(after_in_child=threads.cache_clear)  # a forked process has neither these threads
os.register_at_fork(after_in_child=processes.cache_clear)  # nor these processes


def process_pool(workers):
    """An executor of so many processes, with a BLAS thread each; Ctrl-C is their parent's to answer."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker():
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    np.seterr(all="ignore")
    one_blas_thread()


def _die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def pool_map(pool, function, *columns):
    """pool.map, whose new workers ignore Ctrl-C from the start."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            return pool.map(function, *columns)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    except KeyboardInterrupt:  # nobody has the results yet, which cancel what waits when they are given up
        pool.shutdown(wait=False, cancel_futures=True)
        processes.cache_clear()
        raise


def _dask_map(client, function, *columns):
    """The executor's map; a parcel whose worker is lost goes to another."""
    from distributed import KilledWorker
    from distributed.client import ClosedClientError

    try:
        return list(client.get_executor().map(function, *columns))
    except (KilledWorker, CancelledError, ClosedClientError):  # the last two where the scheduler is lost
        raise BrokenExecutor from None


def dask_client(address, module):
    """A client of the scheduler there, whose workers have been sent this project's modules."""
    try:
        from distributed import Client
    except ImportError:
        raise Unusable('--scheduler needs Dask; pip install "dask[distributed]"') from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a lost scheduler is said in a line
    try:
        client = Client(address, timeout=10)
    except Exception as error:  # whatever the address says
        answer = f"no scheduler answers ({tasks.one_line(error)})"
        raise Unusable(f"--scheduler {address}: {answer}; start one with dask scheduler")
    for name in dict.fromkeys(("nets", "tasks", "cli", "maml", module.__name__)):
        client.upload_file(sys.modules[name].__file__, load=False)
    client.run(one_blas_thread)
    return client


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def one_blas_thread():
    """Keeps NumPy's OpenBLAS to one thread, and glibc to one heap, which it keeps.

    A task's products are too small to share between cores, and where another process has one of the cores
    OpenBLAS's threads wait for each other up to 50 times as long as a single thread needs. What runs in
    parallel is parcels of tasks; memory that glibc returned to the system, as it does with a thread's own
    heap when that is empty and with every large array, took a third of TRPO's time to fault in.
    """
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads"):  # of wheels, of systems
        if hasattr(library, name):
            getattr(library, name)(1)
    if hasattr(library, "mallopt"):
        library.mallopt(-8, 1)  # M_ARENA_MAX
        library.mallopt(-4, 0)  # M_MMAP_MAX
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# The report -------------------------------------------------------------------------------------


def report(models, args, module):
    """The table of each model, in --results and on stdout; --plot."""
    rows, curves, tables = [], [], []
    models = [(*model, name) for model, name in zip(models, names_of(models, args))]
    for experiment, learned, name in models:
        s, asked = experiment.settings, settled(module.EVALUATION, args, experiment.settings)
        tell(f"evaluating {name} on {asked['eval_tasks']} unseen tasks")
        experiment.map = partial(counting, experiment.map, experiment.metric_name)
        columns, model = {}, {"model": name} if len(models) > 1 else {}
        for shots, columns[shots] in experiment.test(learned, asked):
            label = {"task": s["task"], "method": s["method"], "shots": shots}
            for step, summary in enumerate(columns[shots]):
                rows.append(label | {"step": step, "metric": experiment.metric_name} | summary | model)
            curves.append((f"{name}, K = {shots}", columns[shots]))
        tables.append(table(experiment, asked["eval_tasks"], columns, name))
    try:
        if args.results:
            with writing(args.results) as file:
                file.write(lines_of([rows[0], *(row.values() for row in rows)]))
    finally:  # what was measured is told, also where a full disk does not take it
        for text in tables:
            tell(text, to="stdout")
    if args.plot:
        save_picture(args.plot, module.plot(models, curves, args.log))


def names_of(models, args):
    """What tells models apart: their methods, or their files where these do not."""
    methods = [experiment.method for experiment, _ in models]
    return methods if len(set(methods)) == len(methods) else args.evaluate


def table(experiment, count, columns, name):
    """One model's table: a row a gradient step, a column a support size, and what is published."""
    s = experiment.settings
    what = [s["task"], *(f"{s[key]}{text}" for key, text in {"ways": "-way", "net": ""}.items() if key in s)]
    what += [s["method"], f"seed {s['seed']}", f"{iterations_of(s)} meta-iterations"]
    what += [name] if name != s["method"] else []
    heads = "".join(f"K = {shots}".ljust(34) for shots in columns)
    lines = ["", ", ".join(what), f"{count} unseen tasks, {experiment.heading}", "", f"steps  {heads}paper"]
    for step, row in enumerate(zip(*columns.values())):
        cells = "".join(f"{cell(summary, experiment.scale, experiment.digits):<33} " for summary in row)
        published = {shots: experiment.published(shots).get(step) for shots in columns}
        paper = ", ".join(f"{figure} at K = {shots}" for shots, figure in published.items() if figure)
        lines.append(f"{step:>5}  {cells}{paper}".rstrip())
    return "\n".join(lines)


def cell(summary, scale, digits):
    """A mean with its interval, or how many tasks diverged, and the median."""
    mean, ci95, median = (f"{summary[key] * scale:.{digits}f}" for key in ("mean", "ci95", "median"))
    if summary["diverged"]:
        return f"median {median}, {summary['diverged']} of {summary['tasks']} diverged"
    return f"{mean} ± {ci95}"


def check_picture(flag, path):
    """Unusable where a picture could not be drawn, or written to `path`."""
    canvas = canvas_of(1, 1)
    try:
        canvas.text(0.5, 0.5, "±")
        canvas.savefig(io.BytesIO(), format=os.path.splitext(path)[1][1:])
    except Exception as error:  # whatever that format's library says
        raise Unusable(f"{flag} {path}: cannot be drawn ({tasks.one_line(error)}); end the name in png")
    check_writable(flag, path)


def canvas_of(width, height, curves=0):
    """A matplotlib figure, in inches; the higher, the more curves its legend names."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unusable("pictures need matplotlib; pip install matplotlib") from None
    except ValueError as error:  # its environment or matplotlibrc
        raise Unusable(f"matplotlib does not start ({tasks.one_line(error)})") from None
    return Figure(figsize=(width, height + 0.4 * max(0, curves - 6)), layout="constrained")


def text_of(name):
    """A text that holds a file's name, as matplotlib writes it: no formula, and no label that it hides."""
    text = name.encode(errors="surrogateescape").decode(errors="replace").replace("$", r"\$")
    return fill("./" * text.startswith("_") + text, 44)


def save_picture(path, canvas):
    """A matplotlib figure as a file, of the kind that its name ends in."""
    with writing(path) as file:
        canvas.savefig(file, format=os.path.splitext(path)[1][1:], dpi=110)


def panel(axes, curves, experiment, **limits):
    """The metric of unseen tasks against gradient steps: curves are (name, rows of `summarize`).

    The mean and its interval, or of all the median where tasks diverged; the last stands beside the name.
    """
    diverged = any(row["diverged"] for _, rows in curves for row in rows)
    for i, (name, rows) in enumerate(curves):
        middle = np.array([row["median" if diverged else "mean"] for row in rows])
        half = np.array([0 if diverged else row["ci95"] for row in rows])
        median = f"median {experiment.scale * middle[-1]:.{experiment.digits}f}"
        name += f": {median if diverged else cell(rows[-1], experiment.scale, experiment.digits)}"
        how = {"marker": "osv^D*PX"[i % 8], "ms": 4, "lw": 1.2, "label": text_of(name)}
        (line,) = axes.plot(experiment.scale * middle, **how)
        low, high = experiment.scale * (middle - half), experiment.scale * (middle + half)
        axes.fill_between(range(len(rows)), low, high, color=line.get_color(), alpha=0.25, lw=0)
    axes.set(xlabel="gradient steps", **limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    what = experiment.heading.split(":")[0] + ": median, as tasks diverge"
    axes.set_title(what if diverged else experiment.heading.split(";")[0], loc="left", fontsize=10)
    lines = axes.get_legend_handles_labels()
    axes.figure.legend(*lines, fontsize=9, loc="outside lower left", frameon=False)
