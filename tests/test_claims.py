"""Published claims: they fail where they were made, are told elsewhere, and say so where they cannot be measured."""

from __future__ import annotations

import pytest

CLAIMS = """
def test_claim(zimage_claim):
    zimage_claim.check()
"""
HERE = 'lane = "cpu"\nengine = "diffusers"\nworkload = "turbo-tiny"\nmodels = ["synthetic-tiny"]\nsource = "a study"'
FAR = 'lane = "gb10"\nengine = "comfyui"\nworkload = "turbo-1024"\nsource = "a study"'
LATENCY = 'metric = "warm_latency"\nprinted_unit = "s"'
FASTER = f"""
title = "NVFP4 is 1.37 times as fast as bf16"
{LATENCY}
kind = "ratio_at_least"
variants = ["nvfp4"]
against = "bf16"
factor = 1.37
printed = {{ bf16 = 7.55, nvfp4 = 5.5 }}
"""
SLOWER = f"""
title = "the cast is slower"
{LATENCY}
kind = "slower_than"
variants = ["fp8-cast"]
against = "bf16"
printed = {{ bf16 = 7.55, fp8-cast = 8.27 }}
"""
SAME = f"""
title = "the encoder does not matter"
{LATENCY}
kind = "unchanged"
variants = ["nvfp4-fp8e"]
against = "nvfp4"
printed = {{ nvfp4-fp8e = 5.52, nvfp4 = 5.5 }}
"""
SMALLER = """
title = "NVFP4 saves 44 %"
metric = "working_set"
kind = "saves_bytes"
variants = ["nvfp4"]
against = "bf16"
share = 0.44
printed = { bf16 = 20.64, nvfp4 = 11.52 }
printed_unit = "GiB"
"""
DISK = SMALLER.replace("working_set", "disk_bytes")
ORDER = f"""
title = "NVFP4, bf16, FP8"
{LATENCY}
kind = "order"
variants = ["nvfp4", "bf16", "fp8-cast"]
printed = {{ nvfp4 = 5.5, bf16 = 7.55, fp8-cast = 7.60 }}
"""
MIB = 1 << 20
USED = {"unavailable": {"working_set": "it had drawn before"}}


@pytest.fixture
def claim(script):
    """Asks for one claim: its table, where it was made, what runs say; returns the session's end."""

    def ask(table, where, *arguments, names="bf16,nvfp4,nvfp4-fp8e,fp8-cast", **runs):
        script.project.makepyfile(test_suite=CLAIMS)
        own = script.project.path / "own.toml"
        own.write_text(f"[claims.mine]\n{where}\n{table}", encoding="utf-8")
        script(**{name: [run] if isinstance(run, dict) else run for name, run in runs.items()})
        return script.run(names, "--zimage-catalog", str(own), "-k", "mine", "-rs", *arguments)

    return ask


def timed(*seconds):
    return [{"rounds": [each]} for each in seconds]


def size(mebibytes):
    return {"rounds": [1.0], "rss_idle": 100 * MIB, "rss_peak": (100 + mebibytes) * MIB, "disk_bytes": mebibytes}


HOLDING = {
    "ratio": (FASTER, {"bf16": timed(7.55), "nvfp4": timed(5.50)}),
    "slower": (SLOWER, {"bf16": timed(7.55), "fp8_cast": timed(8.27)}),
    "same": (SAME, {"nvfp4": timed(5.50), "nvfp4_fp8e": timed(5.52)}),
    "smaller": (SMALLER, {"bf16": size(2064), "nvfp4": size(1152)}),
    "disk": (DISK, {"bf16": size(2064), "nvfp4": size(1152)}),
    "order": (ORDER, {"nvfp4": timed(5.5), "bf16": timed(7.6), "fp8_cast": timed(7.5)}),
}
BROKEN = {
    "ratio": (FASTER, {"bf16": timed(7.55), "nvfp4": timed(6.30)}, "nvfp4 / bf16 = 0.834"),
    "slower": (SLOWER, {"bf16": timed(7.55), "fp8_cast": timed(7.56)}, "fp8-cast / bf16 = 1.001"),
    "same": (SAME, {"nvfp4": timed(5.50), "nvfp4_fp8e": timed(5.10)}, "nvfp4-fp8e / nvfp4 = 0.927"),
    "smaller": (SMALLER, {"bf16": size(2064), "nvfp4": size(1400)}, "nvfp4 / bf16 = 0.678"),
    "disk": (DISK, {"bf16": size(2064), "nvfp4": size(1400)}, "nvfp4 / bf16 = 0.678"),
    "order": (ORDER, {"nvfp4": timed(7.7), "bf16": timed(7.55), "fp8_cast": timed(8.1)}, "bf16 / nvfp4 = 0.981"),
}


@pytest.mark.parametrize("kind", HOLDING)
def test_holds_where_it_was_made(claim, results, kind):
    table, runs = HOLDING[kind]
    claim(table, HERE, **runs).assert_outcomes(passed=1)
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["outcome"], row["metric"]) == ("HOLDS", "pass", "mine")
    assert "a study" in row["claim"]


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_where_it_was_made_fails_with_the_delta(claim, results, kind):
    table, runs, told = BROKEN[kind]
    done = claim(table, HERE, **runs)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*: BROKEN *", "*a study: *cpu through diffusers at*", "  notes *"])
    assert told in done.stdout.str()
    (row,) = results()["verdicts"]
    assert row["outcome"] == "regression"
    assert row["k_new"] == (1 if kind == "disk" else 2 if kind != "slower" else row["k_new"])


def test_a_second_run_whose_figure_is_not_its_own_breaks_nothing(claim, results, script):
    """As of a server that ran already: one run a side is all that there can be."""
    runs = {"bf16": size(2064), "nvfp4": size(1400)}
    claim(SMALLER, HERE, **{name: [run, {**run, **USED}] for name, run in runs.items()})
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["k_new"], row["k_base"]) == ("INCONCLUSIVE", 1, 1)
    assert row["notes"][-1] == "1 of 2 runs count, and no more can: it had drawn before"
    assert sorted(script.ran) == ["bf16-1", "bf16-2", "nvfp4-1", "nvfp4-2"]


@pytest.mark.parametrize("strict", [(), ("--zimage-strict",)])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_elsewhere_is_told_and_fails_nothing(claim, results, script, kind, strict):
    table, runs, told = BROKEN[kind]
    done = claim(table, FAR, *strict, **runs)
    assert done.ret == 0
    (row,) = results()["verdicts"]
    assert row["claim_of"] == (
        "gb10 through comfyui at turbo-1024, seen on cpu through diffusers at turbo-tiny with synthetic-tiny"
    )
    done.stdout.fnmatch_lines(
        [
            *("=* zimage verdicts =*", f"  claims of {row['claim_of']}", f"    mine  {row['notes'][0]}", ""),
            *("1 verdict: 1 seen", "next: nothing to do: claims of another machine*told here and not judged"),
            "*1 claims seen*",
        ]
    )
    assert told in " ".join(row["notes"])
    assert row["notes"][0].endswith("; not as claimed")
    assert (row["outcome"], row["k_new"]) == ("seen", 1), "no run is made only to judge what cannot fail"
    assert len(script.ran) == len(set(script.ran))


def test_a_noisy_machine_leaves_it_open(claim, results):
    noisy = timed(7.2, 8.4, 7.6)
    claim(SLOWER, HERE, bf16=timed(7.5, 8.0, 7.1), fp8_cast=noisy).assert_outcomes(skipped=0, passed=0, failed=0)
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["k_new"]) == ("INCONCLUSIVE", 3)


def test_open_fails_a_strict_session(claim):
    runs = {"bf16": timed(7.5, 8.0, 7.1), "fp8_cast": timed(7.2, 8.4, 7.6)}
    claim(SLOWER, HERE, "--zimage-strict", **runs).assert_outcomes(failed=1)


def test_absent_variants_are_named(claim):
    done = claim(FASTER, HERE, names="nvfp4", nvfp4=timed(5.5))
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*not measured here: variant bf16 is not selected*"])
    unknown = claim(FASTER.replace("nvfp4", "nvfp3"), HERE, bf16=timed(7.55))
    unknown.assert_outcomes(skipped=1)
    unknown.stdout.fnmatch_lines(["*not measured here: variant nvfp3 is not known*"])


def test_a_figure_that_this_machine_does_not_have(claim):
    done = claim(SMALLER.replace("working_set", "device_peak"), HERE, bf16=size(2064), nvfp4=size(1152))
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*not measured here: nvfp4: *reports no device memory*"])


@pytest.mark.parametrize("where", [HERE, FAR], ids=["here", "elsewhere"])
def test_one_of_two_failing_to_run_fails_the_claim(claim, results, where):
    killed = {"error": "EngineError", "message": "worker of bf16: was killed by SIGKILL"}
    done = claim(FASTER, where, bf16=killed, nvfp4=timed(5.5))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*worker of bf16: was killed by SIGKILL*"])
    assert [error["kind"] for error in results()["errors"]] == ["EngineError"]
    assert results()["verdicts"] == []


def test_an_unfit_machine_judges_no_claim(claim, results):
    hot = {"throttle": ["thermal throttle"]}
    runs = {name: [{"rounds": [1.0], "fitness": {"before": {}, "during": hot}}] for name in ("bf16", "nvfp4")}
    own = "[devices.cpu]\ntitle = 'CPU'\nstored_timings = false\n"
    done = claim(FASTER + own, HERE, **runs)
    assert done.ret == 0
    (row,) = results()["verdicts"]
    assert (row["outcome"], row["unfit"]) == ("unfit", ["thermal throttle"])


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadgroup")])
def test_shipped_claims_are_shown_on_any_machine(script, results, workers):
    script.project.makepyfile(test_suite=CLAIMS)
    script(default=timed(1.0), nvfp4=timed(0.7), nvfp4_fp8e=timed(0.71))
    done = script.run("bf16,nvfp4,nvfp4-fp8e", *workers)
    assert done.ret == 0
    seen = {row["metric"]: row["notes"][0] for row in results()["verdicts"]}
    assert {"nvfp4-speedup", "encoder-latency", "nvfp4-fp8e-disk"} <= set(seen)
    assert {row["claim_of"].partition(", seen")[0] for row in results()["verdicts"]} == {
        "gb10 through comfyui at turbo-1024"
    }
    lines = done.outlines[done.outlines.index(next(line for line in done.outlines if "zimage verdicts" in line)) :]
    assert {line.split()[0] for line in lines if line.startswith("    ")} == set(seen), "a line for each claim"
    assert max(map(len, lines)) <= 160
    assert sorted(script.ran) == ["bf16-1", "nvfp4-1", "nvfp4-fp8e-1"]


def test_claims_come_after_the_variants(script):
    script.project.makepyfile(
        test_suite="def test_warm(zimage): zimage.gate(zimage.warm_latency())", test_claims=CLAIMS
    )
    script(default=timed(1.0))
    done = script.run("bf16,nvfp4", "--collect-only", "-q")
    lines = [line for line in done.outlines if "::" in line]
    kinds = ["claim" if "test_claim[" in line else "variant" for line in lines]
    assert kinds == sorted(kinds, reverse=True)
    assert kinds.count("variant") == 2


def test_on_another_machine_the_claims_lane_stops_the_session(script):
    script.project.makepyfile(test_suite=CLAIMS)
    script(default=timed(1.0))
    done = script.run("bf16,nvfp4", "-m", "gb10")
    assert done.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (FASTER.replace("factor = 1.37", "factor = 0.7"), "key 'factor'"),
        (FASTER.replace("factor = 1.37", ""), "key 'factor'"),
        (SMALLER.replace("0.44", "1.44"), "key 'share'"),
        (SLOWER + "share = 0.3\n", "key 'share'"),
        (SLOWER.replace('against = "bf16"', ""), "key 'against'"),
        (ORDER + 'against = "mxfp8"\n', "key 'against'"),
        (ORDER.replace("nvfp4 = 5.5", "nvfp4 = 9.5"), "key 'variants'"),
        (FASTER.replace("bf16 = 7.55, ", ""), "key 'printed'"),
        (FASTER.replace("warm_latency", "warm_latancy"), "did you mean 'warm_latency'"),
        (FASTER.replace("ratio_at_least", "ratio"), "key 'kind'"),
    ],
)
def test_a_claim_that_cannot_be_is_refused(claim, table, told):
    done = claim(table, HERE, bf16=timed(7.55))
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert told in done.stderr.str()
    assert "claims.mine" in done.stderr.str()
