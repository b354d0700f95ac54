"""Every GPU kernel of nearest neighbours as `triton_aot` takes it, at the sizes it is launched with."""

from __future__ import annotations

ARCHITECTURES = (80, 90, "gfx942")
_ONCE = {"warps": 4, "stages": 2}


def _typed(**names):
    """Arguments by type: _typed(i32="rows words", p64="index_ptr") -> {"rows": "i32", "words": "i32", "index_ptr": "*i64"}."""
    kinds = {"p32": "*i32", "p64": "*i64", "pf32": "*fp32", "pf64": "*fp64"}
    return {name: kinds.get(kind, kind) for kind, listed in names.items() for name in listed.split()}


def jobs():
    return [*_bits(), *_features(), *_windows_and_runs()]


def _compiled(module, kernel, signature, constexprs, given, **options):
    for arch in ARCHITECTURES:
        if "PRECISION" in constexprs:
            constexprs = constexprs | {"PRECISION": "tf32x3" if isinstance(arch, int) else "ieee"}
        yield {
            "module": f"engine.kernels.nearest.{module}",
            "kernel": kernel,
            "signature": signature,
            "constexprs": constexprs,
            "arch": arch,
            "num_warps": given["warps"],
            "options": options | {"num_stages": given["stages"]},
            "divisible": ["axes", "words"],
        }


def _tile(given):
    return {"QUERIES": given["queries"], "ROWS": given["rows"], "STEP": given["step"]}


def _bits():
    from engine.kernels.nearest.triton_shared import DEFAULTS, FILLED

    rows = _typed(p32="query_ptr query_ones_ptr database_ptr database_ones_ptr")
    sizes = _typed(p64="query_group_ptr database_group_ptr", i32="queries members words", i64="shift")
    crossed = rows | _typed(p32="out_ptr sites_ptr", i32="queries members words")
    counted = rows | sizes | _typed(i32="limit", p64="counts_ptr")
    filled = counted | _typed(p64="starts_ptr index_ptr", p32="distance_ptr sites_ptr")
    for mode, name in enumerate(("bits", "popcount", "observed")):
        given = DEFAULTS[name]
        how = {"MODE": mode} | _tile(given)
        limited = how | {"GROUPS": True}
        few = limited | {"QUERIES": min(FILLED, given["queries"])}
        minima = limited | {"GROUP": given["group"]}
        yield from _compiled("triton_bits", "cross_kernel", crossed, how, given)
        yield from _compiled("triton_bits", "minima_kernel", rows | sizes | _typed(p32="minima_ptr"), minima, given)
        yield from _compiled("triton_bits", "count_kernel", counted, limited, given)
        yield from _compiled("triton_bits", "fill_kernel", filled, few, given)
    members = sizes | _typed(p32="query_ptr database_ptr chosen_ptr", p64="keys_ptr both_ptr", i32="slots")
    for observed in (False, True):
        how = {"GROUPS": True, "GROUP": 32, "BLOCK": 64, "OBSERVED_MODE": observed}
        yield from _compiled("triton_bits", "members_kernel", members, how, _ONCE)


def _features():
    from engine.kernels.nearest.triton_shared import DEFAULTS, FILLED

    sides = _typed(pf32="query_scale_ptr query_square_ptr query_rest_ptr scale_ptr square_ptr rest_ptr")
    sizes = _typed(p64="query_group_ptr database_group_ptr", i32="queries members axes", i64="shift")
    for name, kind in (("int8", "*i8"), ("bfloat16", "*bf16"), ("float32", "*fp32")):
        given = DEFAULTS[name]
        rows = {"query_ptr": kind, "database_ptr": kind} | sides | sizes
        how = _tile(given) | {"GROUPS": True, "PRECISION": ""}
        few = how | {"QUERIES": min(FILLED, given["queries"])}
        minima = rows | _typed(p64="row_ptr", p32="minima_ptr")
        counted = rows | _typed(pf32="reach_ptr", p64="counts_ptr")
        filled = counted | _typed(p64="starts_ptr index_ptr")
        yield from _compiled("triton_features", "minima_kernel", minima, how | {"GROUP": given["group"]}, given)
        yield from _compiled("triton_features", "count_kernel", counted, how, given)
        yield from _compiled("triton_features", "fill_kernel", filled, few, given)
    mean = _typed(pf32="rows_ptr", pf64="mean_ptr", i32="rows axes")
    yield from _compiled("triton_features", "mean_kernel", mean, {"BLOCK": 64}, _ONCE)
    exact = _typed(pf32="query_ptr database_ptr", pf64="query_mean_ptr mean_ptr", i32="axes")
    sums = exact | _typed(p64="row_ptr m_ptr", pf64="total_ptr", i32="columns")
    ordered = exact | _typed(p64="n_ptr m_ptr", pf32="value_ptr", i32="pairs")
    for l2 in (True, False):
        how = {"L2": l2, "BLOCK": 64}
        yield from _compiled("triton_features", "sums_kernel", sums, how | {"SLOTS": 16, "BLOCK": 128}, _ONCE)
        yield from _compiled("triton_features", "ordered_kernel", ordered, how, _ONCE, enable_fp_fusion=False)


def _windows_and_runs():
    from engine.kernels.nearest.triton_shared import DEFAULTS

    given = DEFAULTS["windows"]
    cut = _typed(p32="bits_ptr out_ptr", p64="edge_ptr word_ptr segment_ptr", i32="words rows")
    yield from _compiled("triton_windows", "cut_kernel", cut, {"BLOCK": 128}, _ONCE)
    totals = _typed(p32="query_ptr database_ptr total_ptr", p64="word_ptr", i32="queries members edges")
    how = {"QUERIES": given["queries"], "ROWS": given["rows"]}
    yield from _compiled("triton_windows", "totals_kernel", totals, how, given)
    window = _typed(
        p32="total_ptr", p64="ends_ptr query_group_ptr database_group_ptr", i32="queries members windows", i64="shift"
    )
    how = {"GROUPS": True, "GROUP": given["group"]}
    minima = window | _typed(p32="minima_ptr", i32="columns")
    yield from _compiled("triton_windows", "minima_kernel", minima, how | {"COLUMNS": 32}, _ONCE)
    members = window | _typed(p32="chosen_ptr", p64="keys_ptr", i32="slots first")
    yield from _compiled("triton_windows", "members_kernel", members, how, _ONCE | {"warps": 1})
    runs = _typed(
        p32="query_ptr database_ptr",
        p64="position_ptr short_ptr known_ptr query_group_ptr database_group_ptr bp_ptr sites_ptr index_ptr",
        i32="members length words query_words columns",
        i64="shift",
    )
    how = {"GROUPS": True, "LANES": DEFAULTS["runs"]["rows"]}
    yield from _compiled("triton_runs", "run_kernel", runs, how, DEFAULTS["runs"])
