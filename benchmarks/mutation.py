"""Mutation test of the numerical modules: which small changes of the code does no test notice?

    pip install -e ".[test]" cosmic-ray
    python benchmarks/mutation.py                               # every mutant; hours
    python benchmarks/mutation.py --sample 40 --minutes 60      # 40 of each module, drawn with a seed
    python benchmarks/mutation.py --modules _rows,_costs --resume

The mutants are cosmic-ray's (`OPERATORS`, one or two replacements for each operator of Python), except in annotations,
signatures' `*` and products with `unit`, which is 1, and those that compile to the same code as another. They are made
in a clone of the last commit, in a temporary folder, never in this checkout. cosmic-ray itself would start a test
command for each: seconds of importing JAX every time. Here the process that has imported JAX, but not jxent, forks
instead, and the child runs pytest. Tests are mostly compilation: XLA optimizes little here, and JAX's compilation cache
keeps what no mutant changes, but for tests of shards, since XLA:CPU has crashed on reading programs of several devices
from it. A crash elsewhere is tried again without the cache.

A mutant meets the module's `TESTS`, a small part of all, until one fails. Killed are those that fail a test, cannot be
imported or crash; those that take longer than `PATIENCE` times the unmutated tests count as killed too, and are listed
apart. What survives is to be argued for, one by one: its "reason" in the JSON record is kept as long as the same diff
survives. Each result is written at once: stop at will and go on with `--resume`, also in several processes with
different `--modules`; what survived meets `TESTS` again once they have changed, unless its reason says "equivalent".
Prints Markdown.
"""

import argparse
import ast
import dataclasses
import difflib
import hashlib
import importlib
import json
import marshal
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "mutation.json"
PATIENCE = 4  # and a minute more
ALIVE = {"outcome": "survived", "met": frozenset()}
os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

OPERATORS = [
    f"{kind}_{change}"
    for kind, changes in {
        "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr "
        "BitOr_BitAnd",
        "ReplaceComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt "
        "Is_IsNot IsNot_Is",
        "ReplaceUnaryOperator": "Delete_USub Delete_Not Delete_Invert",
    }.items()
    for change in changes.split()
] + [
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
]


def tests(**names):
    """Node ids: `file="name; name"`, in tests/."""
    return [f"tests/test_{file}.py::test_{name}" for file, line in names.items() for name in line.split("; ")]


# Quick and decisive ones first, and few parameters of each: what survives costs a minute.
COSTS = tests(
    exactness="float32[10-50.0]; near_one_hot_labels; softcap_of_a_confident_row[index]; "
    "smoothing_towards_one_class[0]; equal_logits[1.0]; half_precision_logits[bfloat16-3]; "
    "sums_of_positive_terms[index-{'label_smoothing': 0.1}-1000]; smoothing_of_a_confident_row; "
    "a_cost_of_the_normalizer_alone",
    transformations="forward_over_reverse[cross_entropy-index]; forward_over_reverse[cross_entropy-softcap]; "
    "forward_over_reverse[cross_entropy-smooth-probability]",
    cross_entropy="stats[index]; stats[probabilities]; many_classes[20000-0]; huge_finite_logits_are_no_mask[-3e+38]; "
    "a_masked_class_is_no_class[{}-probabilities]; a_masked_class_is_no_class[{'logit_softcap': 5.0}-index]; "
    "a_masked_class_is_no_class[{'label_smoothing': 0.1}-index]; stats_of_a_confident_wrong_row; "
    "smoothing_over_no_class_costs_infinity; smoothing_over_one_class; mixed_dtypes_promote; "
    "more_classes_than_float32_counts",
    gradients="a_class_without_probability[cross_entropy]; cross_entropy[index-none-None]",
    blocks="sums_over_many_classes_are_in_blocks_on_a_cpu",
    sharding="labels_out_of_range_on_shards[cross_entropy]",
)
SOFTMAX = tests(
    exactness="float32[10-50.0]; softmax_gradient_of_a_confident_row; softmax_gradient_of_ties",
    transformations="forward_over_reverse[softmax]; forward_over_reverse[log_softmax]; forward_over_reverse[logsumexp]",
    softmax="ties; infinite_and_nan_logits; rows_without_classes[-inf-softmax]; "
    "rows_without_classes[-inf-log_softmax]; axis_none_and_keepdims; where_selects_classes[log_softmax]; "
    "dtypes[softmax-bfloat16]",
    package="a_call_is_one_program[softmax]; a_call_is_one_program[logsumexp]",
    sharding="axis_name_in_shard_map[8-logsumexp-False]; softmaxes_with_axis_name[log_softmax-False]",
)
LINEAR = tests(
    linear_cross_entropy="block_size_changes_nothing[(33,)-mean]; "
    "equals_cross_entropy[4-index--1-mean-False-6-True-True-None-None-None-None-True-('bias',)]; "
    "equals_cross_entropy[4-probabilities-0-sum-False-None-False-False-ignore_index-None-None-None-True-"
    "('hidden','kernel','bias')]; "
    "equals_cross_entropy[3-index-0-none-False-6-False-True-ignore_index-traced-0.01-None-False-"
    "('hidden','kernel','bias')]; "
    "only_what_is_differentiated_is_computed[mean-(0,)]; only_what_is_differentiated_is_computed[none-(1,)]; "
    "float16_gradients_of_confident_positions_survive[20]; 16_bit_kernel_of_either_layout[bfloat16-None]; "
    "what_excluded_positions_hold_reaches_nothing[index-mean]",
)
REDUCE = tests(
    transformations="forward_over_reverse[cross_entropy-smooth-index]; forward_over_reverse[nll_loss-index]; "
    "forward_over_reverse[nll_loss-probability]",
    cross_entropy="nothing_counts; ignore_index[int8--100]; ignore_index[uint8-255]; negative_weights; stats[index]; "
    "a_weight_of_0_silences_an_infinite_loss; an_ignored_position_is_never_a_hit[-1]; next_token_labels; "
    "narrow_weights_are_summed_in_float32[sample_weight-float16]; "
    "narrow_weights_are_summed_in_float32[class_weight-float16]; "
    "ignore_index[int32--2147483648]; ignore_index[int32-2147483647]",
    sharding="axis_name_in_shard_map[8-nll_loss-False]",
)
SHARDED = tests(
    sharding="linear_under_jit[linear-all-FSDP and vocabulary-Auto]; what_does_not_divide[13-64-7-Explicit]; "
    "arrays_that_are_sharded_unlike_each_other[linear-all-mode2]; what_does_not_divide[16-61-32-Auto]; "
    "linear_under_jit[linear-all-sequence and vocabulary on one axis-Explicit]; an_array_without_a_mesh[hidden]; "
    "linear_under_jit[linear-none-vocabulary, then FSDP of it-Auto]; contexts_of_the_trace[Auto]; "
    "16_bit_gradients_on_some_axes_of_a_mesh[Explicit-P('data',)-bfloat16]; no_positions; "
    "axis_name_in_vmap[linear-all]; one_axis_of_positions_under_jit[Auto]; shard_map_over_some_axes[True]; "
    "linear_under_jit[linear-all-batch, sequence, vocabulary-Auto]; transformations_of_sharded_losses[Auto]; "
    "linear_under_jit[linear-all-batch, sequence, vocabulary-Explicit]; positions_on_a_mesh_of_the_caller; "
    "axis_name_in_shard_map[8-linear-all-True]; axis_name_in_shard_map[8-linear-all-False]; without_shardy",
    linear_cross_entropy="scalar_position; vmap; second_derivatives[False]; "
    "reverse_over_reverse_of_one_argument[False]",
)
TESTS = {
    "_rows": COSTS
    + tests(
        cross_entropy="a_probability_of_a_masked_class_costs_infinity; many_classes_with_the_last_but_one_as_the_label",
        softmax="rows_without_classes; scalars_and_rows_without_classes; empty_arrays",
        memory="losses[logsumexp-(2048, 1000)-float32]; losses[index-(64, 131072)-bfloat16]",
        sharding="axis_name_in_shard_map[8-cross_entropy-True]",
    ),
    "_costs": COSTS,
    "_softmax": SOFTMAX,
    "_reduce": REDUCE,
    "_linear_costs": LINEAR,
    "_sweep": LINEAR
    + tests(
        linear_cross_entropy="default_block_size; float16_gradients_of_a_large_z_loss; "
        "float16_probabilities_of_large_costs; float16_gradients_survive_a_scaled_loss; "
        "float16_of_smoothing_alone; float16_where_nothing_counts; equals_cross_entropy; scalar_position; "
        "float16_gradients_of_confident_positions_survive",
    ),
    "_nll_loss": REDUCE[1:3]
    + tests(
        cross_entropy="nll_loss",
        gradients="a_class_without_probability[nll_loss]",
        package="a_call_is_one_program[nll_loss]",
        sharding="labels_out_of_range_on_shards[nll_loss]; axis_name_in_shard_map[8-nll_loss-probabilities-False]; "
        "logits_under_jit[nll_loss-batch, sequence, vocabulary-Explicit]; "
        "logits_under_jit[nll_loss-probabilities-batch, sequence, vocabulary-Explicit]",
        torch_fixtures="agrees_with_pytorch[nll_loss-index-float64-3]",
    )
    + REDUCE,
    "_labels": REDUCE
    + tests(
        bad_input="label_out_of_range_is_nan_in_its_row_alone[cross_entropy-plain-none]; "
        "label_out_of_range_in_each_dtype; raises[next_token_labels-tokens-scalar-eager]",
        package="a_call_is_one_program[next_token_labels]",
    ),
    "_passes": [
        *COSTS[:1],
        "tests/test_blocks.py",
        *tests(
            cross_entropy="many_classes[20000--1]; many_classes[50257-0]; many_classes[16418--1]",
            softmax="axes",
            sharding="axis_name_in_shard_map[8-logsumexp-True]; gradient_inside_shard_map[nll_loss]; "
            "second_derivatives_in_shard_map[cross_entropy-forward]",
        ),
    ],
    "_blocks": LINEAR[:2]
    + tests(blocks="blocks_of_positions; blocks_are_strided", linear_cross_entropy="no_positions")
    + LINEAR,
    "_sharded": SHARDED,
    "_shards": tests(
        exactness="float32_on_shards[shard_map-8]",
        sharding="stats_with_axis_name; labels_out_of_range_on_shards[cross_entropy]; "
        "gradient_inside_shard_map[nll_loss]; second_derivatives_in_shard_map[cross_entropy-forward]; "
        "logits_under_jit[cross_entropy-all-batch, sequence, vocabulary-Explicit]",
        bad_input="label_out_of_range_is_nan_in_its_row_alone[cross_entropy-plain-none]",
    )
    + SHARDED,
    "_layout": SHARDED,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    module: str
    operator: str
    line: int
    code: str
    diff: str

    @property
    def id(self):
        return hashlib.sha1(f"{self.module} {self.code}".encode()).hexdigest()[:16]


def meaning(code):
    """What distinguishes compiled code, without line numbers."""
    parts = [meaning(c) if hasattr(c, "co_code") else repr(c).encode() for c in code.co_consts]
    return marshal.dumps((code.co_code, code.co_names, code.co_varnames, code.co_exceptiontable, *parts))


def annotations(source):
    """[(start, end)] of the annotations, as (line, column)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def mutants(source, module, state):
    """All of a module's, which are kept in `state`: they take a minute to make."""
    kept = state / f"{module}-{hashlib.sha1((source + str(OPERATORS)).encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return [Mutant(**m) for m in json.loads(kept.read_text())]
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    apart, nodes = annotations(source), list(ast_nodes(get_ast(source)))
    seen, found = {meaning(compile(source, module, "exec"))}, []
    for name in OPERATORS:
        operator = cosmic_ray.plugins.get_operator(f"core/{name}")()
        places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(places):
            if (node.parent and node.parent.type == "parameters") or any(a <= start < b for a, b in apart):
                continue
            if name.endswith("Mul_Div") and node.get_next_leaf().value == "unit":
                continue
            code = mutate_code(source, operator, occurrence)
            try:
                key = meaning(compile(code, module, "exec"))
            except SyntaxError:
                continue
            if key not in seen:
                seen.add(key)
                lines = difflib.unified_diff(source.split("\n"), code.split("\n"), n=0, lineterm="")
                diff = "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))
                found.append(Mutant(module, name, start[0], code, diff))
    kept.write_text(json.dumps([dataclasses.asdict(m) for m in found]))
    return found


def run(clone, names, limit, cache=True):
    """(outcome, the first test that failed, seconds) of these tests."""
    begin, outcome, test = time.monotonic(), "survived", ""
    for sharded in (False, True):
        some = [name for name in names if ("shard" in name) == sharded]
        if some and outcome == "survived":
            outcome, test = fork(clone, some, limit, cache and not sharded)
            if test == "crash" and cache and not sharded:
                outcome, test = fork(clone, some, limit, False)
    return outcome, test, time.monotonic() - begin


def fork(clone, names, limit, cache):
    log, begin = clone / "pytest.log", time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            os.chdir(clone)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            import jax
            import pytest

            jax.config.update("jax_enable_compilation_cache", cache)
            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=line", *names])))
        finally:
            os._exit(3)
    try:
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(0.02)
            if time.monotonic() > begin + limit:
                return "timed out", ""
        pid = None
    finally:
        if pid:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if done[1] == 0:
        return "survived", ""
    lines = log.read_text(errors="replace").splitlines()
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "killed", "crash" if os.WIFSIGNALED(done[1]) else failed[-1] if failed else "no import"


def results_in(state):
    """id -> {"outcome": of each mutant, "met": the tests that it has met}. Killed once is killed."""
    found = {}
    for path in state.glob("*.jsonl"):
        for result in map(json.loads, path.read_text().splitlines()):
            known = found.get(result["id"], ALIVE)
            outcome = result["outcome"] if known["outcome"] == "survived" else known["outcome"]
            found[result["id"]] = {"outcome": outcome, "met": known["met"] | {result["tests"]}}
    return found


def last_record():
    """The record as it is, and (module, diff) -> reason."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"note": "", "survivors": []}
    return record, {(s["module"], s["diff"]): s["reason"] for s in record["survivors"]}


def write_record(drawn, state, commit):
    """The JSON record of the mutants that have been run; returns it in Markdown. Other modules keep what it has."""
    record, reasons = last_record()
    results, table, survivors = results_in(state), {}, []
    if not results:
        return "no results yet"
    for module, (every, some) in drawn.items():
        ran = [(m, results[m.id]["outcome"]) for m in some if m.id in results]
        if not ran:
            table |= {m: row for m, row in record.get("modules", {}).items() if m == module}
            survivors += [s for s in record["survivors"] if s["module"] == module]
            continue
        alive = [m for m, outcome in ran if outcome == "survived"]
        found = [{"module": module, "line": m.line, "diff": m.diff} for m in alive]
        found = [f | {"reason": reasons.get((module, f["diff"]), "")} for f in found]
        table[module] = {
            "possible": len(every),
            "mutants": len(ran),
            "killed": sum(outcome == "killed" for _, outcome in ran),
            "timed out": sum(outcome == "timed out" for _, outcome in ran),
            "survived": len(alive),
            "equivalent": sum(f["reason"].startswith("equivalent") for f in found),
        }
        survivors += found
    counts = [c for c in next(iter(table.values())) if not c.startswith("score")]
    table["all"] = {c: sum(row[c] for row in table.values()) for c in counts}
    for row in table.values():
        dead = row["killed"] + row["timed out"]
        row["score"] = round(dead / max(1, row["mutants"]), 3)
        row["score without equivalents"] = round(dead / max(1, row["mutants"] - row["equivalent"]), 3)
    record = {"commit": commit, "note": record["note"], "modules": table, "survivors": survivors}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    text = [f"| module | {' | '.join(table['all'])} |", f"|---|{'---:|' * len(table['all'])}"]
    text += [f"| {module} | {' | '.join(map(str, row.values()))} |" for module, row in table.items()]
    for s in survivors:
        text.append(f"\n{s['module']}.py, line {s['line']}: {s['reason'] or 'no reason given'}")
        text.append(f"```diff\n{s['diff']}\n```")
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", default=",".join(TESTS), help="without .py, with commas")
    parser.add_argument("--sample", type=int, help="at most so many mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after")
    parser.add_argument("--resume", action="store_true", help="keep the results of earlier runs")
    parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "jxent-mutation")
    parser.add_argument("--report", action="store_true", help="run nothing, write the record of the results")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    until = time.monotonic() + 60 * args.minutes
    args.state.mkdir(parents=True, exist_ok=True)
    if not args.resume and not args.report:
        for path in args.state.glob("*.jsonl"):
            path.unlink()
    clone = pathlib.Path(tempfile.mkdtemp(prefix="clone-", dir=args.state))
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True).stdout
    drawn = {}
    for module in TESTS:
        every = mutants((clone / "jxent" / f"{module}.py").read_text(), module, args.state)
        some = random.Random(f"{args.seed} {module}").sample(every, len(every))[: args.sample]
        drawn[module] = every, some

    wanted = [] if args.report else args.modules.split(",")
    sys.path[:0] = [str(clone)]
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(args.state / f"xla-{args.modules}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    for name in ("chex", "hypothesis", "mpmath", "pytest", "jax.experimental.custom_partitioning", "jax.export"):
        importlib.import_module(name)  # once, before the forks

    log = (args.state / f"{clone.name}.jsonl").open("a")
    equivalent = {key for key, reason in last_record()[1].items() if reason.startswith("equivalent")}
    for module in wanted:
        names, results = TESTS[module], results_in(args.state)
        met = hashlib.sha1("; ".join(names).encode()).hexdigest()[:12]
        alive = [m for m in drawn[module][1] if results.get(m.id, ALIVE)["outcome"] == "survived"]
        alive = [m for m in alive if (module, m.diff) not in equivalent]
        todo = [m for m in alive if met not in results.get(m.id, ALIVE)["met"]]
        if not todo or time.monotonic() > until:
            continue
        path = clone / "jxent" / f"{module}.py"
        source = path.read_text()
        outcome, test, seconds = run(clone, names, 7200)
        print(f"{module}, unmutated: {outcome} its tests in {seconds:.0f} s", flush=True)
        if outcome != "survived":
            sys.exit((clone / "pytest.log").read_text())
        limit = PATIENCE * seconds + 60
        for mutant in todo:
            if time.monotonic() > until:
                break
            path.write_text(mutant.code)
            # What survived before is likely to fail what was added to the list, at its end.
            outcome, test, seconds = run(clone, names[::-1] if mutant.id in results else names, limit)
            path.write_text(source)
            result = {"id": mutant.id, "tests": met, "outcome": outcome, "test": test, "seconds": round(seconds, 1)}
            log.write(json.dumps(result) + "\n")
            log.flush()
            print(f"{module}:{mutant.line} {mutant.operator}: {outcome} {test} ({seconds:.0f} s)", flush=True)
            if outcome == "survived":
                print(mutant.diff, flush=True)
    print(write_record(drawn, args.state, commit.strip()))


if __name__ == "__main__":
    main()
