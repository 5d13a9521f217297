"""Tables and lines of reports."""

from io import StringIO

from rich.console import Console

from paceline.bench.report import print_isas

NAMES = ("avx512bf16", "avx512", "avxvnni", "avxvnni_evex", "avx2", "generic")


def test_instruction_sets_fit_a_terminal_and_experts_are_said_to_be_simulated() -> None:
    found = {"ms": 12345.6, "bound_fraction": 0.5}
    reports = {
        isa: {
            "isa": isa,
            "passes": dict.fromkeys(("1", "2", "4", "8", "16"), found),
            "prompt": found,
            "read_bandwidth_gb_s": 40.0,
            "dot_peaks": {"q4_k": 1e12},
            "expert_overlap": 0.3,
        }
        for isa in NAMES
    }
    out = StringIO()
    print_isas(Console(file=out, width=80), reports)
    text = out.getvalue()
    assert "…" not in text
    assert all(text.count(f"({isa})") == 1 for isa in NAMES)
    assert text.count("12345.6") == 6 * len(NAMES)
    assert text.count("reading memory: 40.0 GB/s") == 1
    assert text.count("experts are SIMULATED: neighbouring rows share 30%") == 1
